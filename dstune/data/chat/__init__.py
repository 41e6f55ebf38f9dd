"""Conversations as a server renders them: the template, what it prints, and which of it is trained."""
