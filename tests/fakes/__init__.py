"""Fake providers: real HTTP servers on loopback whose every fault and oddity a test can ask for."""
