"""Waiting for batches: `watcher` polls for all who wait for an account, `pace` decides how often and how,
`listing` reads the account's batches from page to page."""
