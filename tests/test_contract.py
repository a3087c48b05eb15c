"""Facts about the pinned libraries that the code relies on. Run this file after raising a pin."""

import contextlib
import importlib
import inspect
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.config.settings import Settings


@pytest.fixture(scope="module")
def quantized_by_transformers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small Mixtral, loaded by transformers with bitsandbytes' 4-bit configuration."""
    import transformers
    from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        num_local_experts=4,
    )
    folder: Path = tmp_path_factory.mktemp("mixtral")
    transformers.logging.set_verbosity_error()
    MixtralForCausalLM(config).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes on a CPU; the facts below are what counts
        return MixtralForCausalLM.from_pretrained(folder, quantization_config=quantization)


def test_transformers_does_not_quantize_the_experts(quantized_by_transformers: Any) -> None:
    """transformers leaves the experts unquantized, so this project has 4-bit experts of its own."""
    layer = quantized_by_transformers.model.layers[0]
    assert layer.self_attn.q_proj.weight.dtype is torch.uint8
    assert layer.mlp.experts.gate_up_proj.is_floating_point()
    assert layer.mlp.experts.down_proj.is_floating_point()


def test_serve_hands_the_builder_validated_settings() -> None:
    """Serve validates `args:` as `Settings`, so that a bad key fails before a replica starts."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from serve_app.app import build_app

    application = call_user_app_builder_with_args_if_necessary(
        build_app, {"model": {"name": "tiny"}, "engine": {"max_num_seqs": 3}}
    )
    settings = application._bound_deployment.init_args[0]
    assert isinstance(settings, Settings)
    assert settings.engine.max_num_seqs == 3


def test_ray_does_not_start_by_itself_where_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hook off, a call after Ray has died does not start a new cluster."""
    import ray
    from ray._private import auto_init_hook

    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", False)
    with contextlib.suppress(Exception):  # with the parts that it has not
        ray.nodes()
    assert not ray.is_initialized()


AGENTS = ("--dashboard_agent_command=", "--runtime_env_agent_port=")


def test_the_parts_of_ray_that_the_head_replaces_exist() -> None:
    """`node/head.py` replaces or wraps these functions, and changes these flags of the raylet."""
    import ray
    from ray._private import services
    from ray._private.node import Node
    from ray.serve._private.client import ServeControllerClient

    head = Node.start_head_processes.__code__.co_names
    assert {"start_gcs_server", "start_monitor", "start_api_server"} <= set(head)
    parameters = inspect.signature(Node.start_api_server).parameters
    assert list(parameters) == ["self", "include_dashboard", "raise_on_failure"]
    assert "_webui_url" in Node.start_api_server.__code__.co_names
    assert list(inspect.signature(Node.start_monitor).parameters) == ["self"]
    shutdown = inspect.getsource(ray.shutdown)
    # The driver is disconnected before the processes end, which `ray_node.kill` ends itself.
    assert shutdown.index("shutdown_driver") < shutdown.index("kill_all_processes")
    assert list(inspect.signature(Node.start_ray_processes).parameters) == ["self"]
    start_raylet = inspect.getsource(services.start_raylet)
    for flag in ("--num_prestart_python_workers=", "--maximum_startup_concurrency=", *AGENTS):
        assert flag in start_raylet
    for start in (services.start_gcs_server, services.start_raylet):
        assert "start_ray_process" in start.__code__.co_names
    parameters_used = Node.start_raylet.__code__.co_names
    assert {"worker_path", "runtime_env_agent_port"} <= set(parameters_used)
    waits = ServeControllerClient._wait_for_application_running.__code__.co_names
    assert "CLIENT_POLLING_INTERVAL_S" in waits


def test_ray_has_the_variables_that_are_set_for_it() -> None:
    """Ray ignores a RAY_* variable that it does not have; the raylet's program has the names."""
    import ray

    raylet = Path(ray.__file__).parent.joinpath("core/src/ray/raylet/raylet").read_bytes()
    for name in ("num_workers_soft_limit", "enable_worker_prestart", "memory_monitor_refresh_ms"):
        assert name.encode() in raylet


def test_ray_prints_its_workers_lines_by_the_handler_that_is_replaced() -> None:
    """Ray adds what prints its workers' lines to the dispatcher under this name, and removes it."""
    from ray._private import worker

    from serve_app.node.worker_lines import RAYS_HANDLER

    assert f'"{RAYS_HANDLER}",' in inspect.getsource(worker.connect)
    assert f'remove_handler("{RAYS_HANDLER}")' in inspect.getsource(worker.disconnect)
    # Messages of the raylet do not pass the dispatcher.
    assert "  print_to_stdstream(\n" in inspect.getsource(worker.listen_error_messages)


def test_ray_opens_its_folders_by_one_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`session_folder` replaces the function by which Ray opens its folders to every user."""
    from ray._common import utils

    from serve_app.node import session_folder

    monkeypatch.setattr(utils, "try_make_directory_shared", utils.try_make_directory_shared)
    session_folder.keep_private()
    modes = {"session_1": 0o700, "ray": 0o777}
    for name, mode in modes.items():
        utils.try_to_create_directory(str(tmp_path / name))
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_ray_drops_a_gauge_after_two_exports() -> None:
    """A gauge is copied at least twice in the time in which Ray keeps it."""
    from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

    from serve_app.api.metrics.ray_port import copy_interval_s

    kept_s = OpenTelemetryMetricRecorder._resolve_gauge_ttl_seconds(None)
    assert copy_interval_s() * 4 == kept_s


def test_ports_of_agents_are_files(tmp_path: Path) -> None:
    """The raylet waits for a file per port; -1 in it is a service that is not in use."""
    from ray.dashboard import agent

    from serve_app.node.head import NOT_IN_USE, RUNTIME_ENV_AGENT_PORT, UNUSED_PORTS

    _raylet: Any = importlib.import_module("ray._raylet")
    node = "ab" * 28
    _raylet.persist_port(str(tmp_path), node, UNUSED_PORTS[0], NOT_IN_USE)
    assert (tmp_path / f"{UNUSED_PORTS[0]}_{node}").read_text() == str(NOT_IN_USE)
    names = agent.METRICS_AGENT_PORT_NAME, agent.METRICS_EXPORT_PORT_NAME
    assert (*names, agent.DASHBOARD_AGENT_LISTEN_PORT_NAME) == UNUSED_PORTS
    assert _raylet.RUNTIME_ENV_AGENT_PORT_NAME == RUNTIME_ENV_AGENT_PORT


def test_the_content_type_of_metrics() -> None:
    """`CONTENT_TYPE` is what `generate_latest` writes for a client without preferences."""
    from prometheus_client import exposition

    from serve_app.api.metrics.metrics import CONTENT_TYPE

    assert exposition.choose_encoder("") == (exposition.generate_latest, CONTENT_TYPE)
