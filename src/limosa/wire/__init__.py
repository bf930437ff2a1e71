"""What daemons say to each other and to clients.

``endpoints`` lists every request of the HTTP API once; server, client and OpenAPI document are made from that list.
``api`` has the bodies, ``peer`` the messages two hosts exchange while a VM moves, ``versions`` how they agree.
"""
