"""The job engine: one input of any size in, one result set out, each row paid for exactly once.

job        the Job itself: what to submit, where results land, its identity
options    each option once: name, type, default, choices, a sentence
ledger     the durable record of a job; `folder` reads and writes it and the job's other files
inputs     validates the input and splits it into shards
submit     the entry points: `submit` a job, `resume` it, `stop` it
shard      gets one batch for one shard, exactly once; `lookup` finds batches the ledger does not know
advance    the work of an attempt between two waits
rounds     which rows are submitted again, and how their new outcomes are merged with the old ones
lost       what happens when the provider has lost a batch or its results
running    `Client.run`: a whole job in one call
collect    gathers the results of a round; `landing` puts them in place
foreign    lands batches that were not created by a job
policies   deadlines, timeouts and acceptance, decided once for Python, Airflow and Dagster
"""
