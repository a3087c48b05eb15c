"""The sockets on which a server's processes listen, and their answers to a stranger."""

import importlib
from contextlib import suppress
from typing import Any

import httpx
import psutil

grpc: Any = importlib.import_module("grpc")  # it has no types

GRPC_METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.serve.ASGIService/HandleRequest",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.RayletDriver/ClusterInfo",
)
"""One method for each of Ray's servers: GCS, raylet, its objects, worker, replica, agent, client.
"""
LIMIT_S = 10.0


def listening(pid: int) -> list[tuple[psutil.Process, str, int]]:
    """Process, address and port of each listening TCP socket of `pid` and the processes below."""
    found = []
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found += [
                (process, each.laddr.ip.removeprefix("::ffff:"), each.laddr.port)
                for each in process.net_connections("tcp")
                if each.status == psutil.CONN_LISTEN
            ]
    return found


def is_local(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def refuses(address: str, port: int) -> bool:
    """Returns whether the socket refuses HTTP with 401, or each of Ray's services without a token.

    A service that is not there is UNIMPLEMENTED; one that is there must be UNAUTHENTICATED.
    """
    host = "127.0.0.1" if address in ("::", "0.0.0.0") else address
    with suppress(httpx.TransportError):
        # The dashboard shows its empty page to everybody, and its calls need the token.
        paths = ("/", "/api/serve/applications/")
        urls = [f"http://{host}:{port}{path}" for path in paths]
        return any(httpx.get(url, timeout=LIMIT_S).status_code == 401 for url in urls)
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        codes = {_code(channel, method) for method in GRPC_METHODS}
    refused = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
    return grpc.StatusCode.UNAUTHENTICATED in codes and codes <= refused


def only_shows_figures(address: str, port: int) -> bool:
    """Returns whether the socket is a Prometheus exporter, for which Ray has no token."""
    host = "127.0.0.1" if address in ("::", "0.0.0.0") else address
    with suppress(httpx.TransportError):
        return httpx.get(f"http://{host}:{port}/", timeout=LIMIT_S).text.startswith("# HELP ")
    return False


def _code(channel: Any, method: str) -> Any:
    try:
        channel.unary_unary(method)(b"", timeout=LIMIT_S)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def open_to_strangers(pid: int) -> list[tuple[str, int]]:
    """Addresses and ports of a server that take a call from another machine without a token."""
    return [
        (address, port)
        for _, address, port in listening(pid)
        if not is_local(address) and not refuses(address, port)
    ]
