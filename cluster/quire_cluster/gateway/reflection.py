"""Server reflection under both of its names: grpcio has v1alpha alone, and newer clients ask for v1, which is the same
on the wire."""

import functools
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

_NAME = "grpc.reflection.v1.ServerReflection"


def enable(services: tuple[str, ...], server: grpc.aio.Server) -> None:
    """For these services, and for itself."""
    _describe()
    servicer: Any = reflection.aio.ReflectionServicer((*services, reflection.SERVICE_NAME, _NAME))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
            for name in (reflection.SERVICE_NAME, _NAME)
        ]
    )


@functools.cache
def _describe() -> None:
    """v1's own description, for clients that ask for every service's."""
    alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    text = text_format.MessageToString(alpha).replace("v1alpha", "v1")
    described = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(described.SerializeToString())
