"""Turn results into tables, charts and pages."""
