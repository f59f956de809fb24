"""Airflow as it is deployed: PostgreSQL, Celery over Redis, two workers, two triggerers.

What a deployment does to a waiting task, each with a provider of its own that keeps the record: the scenarios
run side by side in one cluster, see `scenarios.py`.
"""
