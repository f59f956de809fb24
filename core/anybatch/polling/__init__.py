"""Waiting for batches: `watcher` polls for all who wait for an account, `pace` decides how often and how."""
