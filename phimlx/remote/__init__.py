"""A model that a running server holds, used as one that is loaded here."""
