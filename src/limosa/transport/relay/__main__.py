"""``python -m limosa.transport.relay DESCRIPTOR``: what a host daemon starts; see ``process``."""

import sys

from limosa.transport.relay.process import main

main(sys.argv[1:])
