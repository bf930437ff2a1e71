"""The demo: a running VM moves to another host and back while a client keeps asking.

Everything a person could type is typed here too: the lab, the VM and the moves are made with the ordinary ``limosa``
command, whose output goes to the terminal untouched. The demo adds what stands beside the moves::

    __main__   the play, from the lab's building to the exit code
    stage      the lab and its VM: commands shown and run, taken away whatever happens
    client     asks the VM from another namespace and times every answer
    watch      one move by the command line, and its progress as the daemon streams it
    outcome    what the client saw of each move; the JSON object (pure)
    table      the table at the end
    picture    latency, rates and switchovers over time, as SVG

All moments are of the monotonic clock, in seconds.
"""
