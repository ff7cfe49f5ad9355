"""Cold-start data: a teacher writes traces of easy problems, and those that pass the checks are kept.

settings -> rounds (teacher: endpoint | engine; journal) -> checks -> balance -> traces.parquet, report
"""
