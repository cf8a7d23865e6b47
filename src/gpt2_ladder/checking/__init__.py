"""Check a GPT of the user's own."""
