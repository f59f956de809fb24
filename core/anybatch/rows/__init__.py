"""Rows: request lines going out, result lines coming in, and tables at both ends.

requests   reads and validates request lines; `sources` says which values may hold them
planning   validates the whole input and splits it into shards
downloads  downloads a batch's result files until they are complete
results    turns result lines into rows, and rows into landed lines
merge      merges result files into the order of the input; `tally` adds up counts, tokens and cost
tables     turns a table into requests, and results into a table; `readers` and `shapes` recognise tables
"""
