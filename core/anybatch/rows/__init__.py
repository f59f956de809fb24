"""Rows: request lines on their way out, result lines on their way in, and tables at both ends.

requests   request lines, validated and split into shards; `sources` is what may be given as such lines
downloads  a batch's result files, fetched until they are complete
results    a result line as a row, a row as a landed line
merge      result files in the order of the input; `tally` is what the rows add up to
tables     from a table to requests and back; `readers` and `shapes` know what a table is
"""
