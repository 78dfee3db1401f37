"""Quire's cluster: Ray actors, gateways, routing, the command line."""

import os

# gRPC reads it once, before its first channel or server. Ray starts its processes with fork and exec; under gRPC's own
# handlers of forks some abort in between, and sometimes this process hangs (grpc/grpc#43055). Nothing here forks else.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
