"""Phi-4-mini-flash-reasoning: state spaces, sliding windows and one layer of full attention."""
