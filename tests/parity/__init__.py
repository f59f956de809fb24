"""The same jobs through plain Python, Airflow and Dagster: the same end, the same report, the same bill."""
