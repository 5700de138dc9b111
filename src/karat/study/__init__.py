"""Studies: variants and seeds from a configuration file, trained, measured and put into one table with its figures.

It stands below `karat.train`, `karat.bench` and `karat.analyze`, whose parts it puts together, and above the command
line. document: the file; plan: the runs it asks for; work: training them, by one process or several; timing, measures:
what is measured beside accuracy; rows, statistics: the results; table, figures: how they are shown.
"""
