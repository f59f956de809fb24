"""Dagster as it is deployed: PostgreSQL; daemon, webserver and two code servers as processes of their own.

What people, time and the machine do to batch assets; each scenario has an account of its own, at a provider
in the test's process that keeps the record. The scenarios run side by side in one deployment.
"""
