"""One self-contained HTML page about a run, a sweep, or several runs side by side; made from the files of the runs alone."""
