"""Studies: variants and seeds from a configuration file, trained, measured and put into one table with its figures.

It puts together parts of `karat.train`, `karat.study.bench` and `karat.analyze`. document: the file; plan: the runs it
asks for; work: training them, by one process or several; timing, measures: what is measured beside accuracy; rows,
statistics: the results; table, figures: how they are shown.
"""
