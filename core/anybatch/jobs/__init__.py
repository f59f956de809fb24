"""The job engine: one input, however large, as one result set, paid for exactly once.

job        what is to be done, and its identity
options    each option once: name, type, default, choices, a sentence
ledger     the durable record of it; `folder` keeps it, and all other files of the job
inputs     the input, validated and split into shards
submit     begin an attempt, go on with one, stop the job
shard      how one shard comes to its batch, once; `lookup` finds batches that nobody noted
advance    an attempt: what is done between two waits
rounds     which rows go again, and how their later outcomes fold into the earlier ones
lost       what becomes of a batch that the provider has lost
running    a whole job in one call: what is done between two waits
collect    the results of a round put together; `landing` puts them in place
"""
