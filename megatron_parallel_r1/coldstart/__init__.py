"""Cold-start data: a teacher writes traces of easy problems, and those are kept that the one parser and the
right answer let pass.

    settings -> rounds (teacher: endpoint | engine; journal) -> checks -> balance -> traces.parquet, report
"""
