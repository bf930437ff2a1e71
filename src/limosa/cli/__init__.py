"""The command line: ``limosa NOUN VERB``.

``main`` is the entry, ``program`` the parser, the errors and the exit codes; one module for each noun. A command's
start-up is part of every move's wall time, so modules import at their top only what every run of theirs needs: no rich,
no ssl, no cryptography, no asyncio.
"""
