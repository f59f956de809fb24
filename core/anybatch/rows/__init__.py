"""Rows: request lines on their way out, result lines on their way in, and tables at both ends.

requests   request lines, read and validated; `sources` is what may be given as such lines
planning   the input as a whole: all its lines, split into shards
downloads  a batch's result files, fetched until they are complete
results    a result line as a row, a row as a landed line
merge      result files in the order of the input; `tally` is what the rows add up to
tables     from a table to requests and back; `readers` and `shapes` know what a table is
"""
