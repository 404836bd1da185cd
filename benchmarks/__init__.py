"""Measurements of the product on the machine at hand, each beside a floor that is measured in the same run.

A floor does the least that the same bytes need, with nothing of ours in between. Timings of a shared machine wander, so
a figure here is a median of several runs, taken turn by turn with those of its floor. Every benchmark prints a table
for people, and a last line of JSON for programs (`benchmarks.report`).
"""
