"""`parallel-r1 doctor`: tries on a machine or in a job what the first hour of a run would find out.

Each check returns findings; a finding that a run would fail on is a fault and says what to do.
"""
