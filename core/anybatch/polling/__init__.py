"""Waiting for batches.

watcher    polls for all who wait for an account; `registry` finds the one of an event loop and account
schedule   who waits for which batch, and when each is looked at next
pace       how often and how to look: decisions
listing    a provider's list of batches, read page by page
"""
