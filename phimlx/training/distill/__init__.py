"""Learning from a teacher: its answers, or its probabilities, which are on disk by then."""
