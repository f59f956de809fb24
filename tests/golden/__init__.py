"""Job folders as an earlier version left them, and what has to land of them, byte for byte."""
