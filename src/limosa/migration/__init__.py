"""Moving one VM.

``source`` and ``destination`` are the two scripts; read those first. What they decide is pure and stands apart:
``preflight`` (may it start), ``convergence`` (what to do while it does not end), ``ownership`` (who owns the VM after
something broke), ``progress`` (what people see). ``journal`` remembers each step; ``peer`` is the small protocol
through which the scripts know each other, over a network or in one process.
"""
