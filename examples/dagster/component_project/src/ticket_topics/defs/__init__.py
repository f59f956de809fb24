"""Components and plain definitions, loaded by their place in this folder."""
