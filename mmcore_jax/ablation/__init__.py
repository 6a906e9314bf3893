"""The paper's ablations: a table of variants, the runs that it needs, and a report of what came out."""
