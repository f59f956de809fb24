"""One suite that every provider passes, sync and async, against a fake of its wire format over loopback."""
