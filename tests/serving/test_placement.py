"""What has no room, and a port that is taken, are refused before anything starts."""

import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from medray.config import EngineConfig
from medray.config.serving import ServeConfig
from medray.errors import ConfigError
from medray.plan.demand import Demand, served_demands
from medray.serving.placement import check_fits, check_port, plain_errors
from medray.testbed.fake_cluster import FakeCluster, free_port


@pytest.fixture
def not_joined(monkeypatch):
    """This process as one that has joined no Ray, whatever earlier tests have started in it."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray._private.worker._global_node", None)


@pytest.fixture
def run(monkeypatch, not_joined):
    """Runs a function as `serve run` runs a builder, before it joins or starts Ray; (exit code, output)."""
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    def made(work, address="local"):
        @click.command()
        @click.option("--address")
        def serve_run(address):
            with plain_errors():
                work()

        done = CliRunner().invoke(serve_run, ["--address", address], catch_exceptions=False)
        return done.exit_code, done.output

    return made


def endpoint(engine_cpus=None, run_cpus=2, **options):
    config = ServeConfig(run="r", engine_cpus=engine_cpus, **options)
    engine = config.engine_of(EngineConfig(cpus_per_actor=run_cpus))
    return served_demands(config, {"tuned": engine, "base": engine})["endpoint"]


def test_the_demos_run_fits_two_cpus_and_what_does_not_is_said(run):
    assert run(lambda: check_fits(endpoint(), "")) == (0, "")
    for wanted in (
        endpoint(engine_cpus=1),
        endpoint(engine_cpus=4),
        endpoint(engine={"cpus_per_actor": 2}),
        endpoint(replicas=(3, 3)),
        endpoint(place={"memory_gib": 10**6}),
        endpoint(engine={"gpus_per_actor": 64}),
        endpoint(place={"labels": {"medray-group": "generate"}}),
        endpoint(replicas=(0, 1), engine_cpus=4),
    ):
        code, said = run(lambda wanted=wanted: check_fits(wanted, "lower engine_cpus"))
        assert (
            code == 1
            and said.startswith("Error: serving: ")
            and "this machine (2 CPUs" in said
            and said.endswith("lower engine_cpus\n")
            and "Traceback" not in said
        )


def test_a_replica_on_cpu_reserves_what_leaves_room_for_others():
    def cpus(tuned=None, **options):
        return ServeConfig(run="r", **options).engine_of(tuned).cpus_per_actor

    assert (
        cpus(EngineConfig(cpus_per_actor=2)) == cpus(EngineConfig(cpus_per_actor=0)) == cpus() == 0.5
        and cpus(EngineConfig(cpus_per_actor=0.25)) == 0.25
    )
    assert cpus(EngineConfig(cpus_per_actor=8, gpus_per_actor=1)) == 8, "as planned for its machines"
    assert (
        cpus(engine={"cpus_per_actor": 3}) == 3
        and cpus(EngineConfig(cpus_per_actor=8, gpus_per_actor=1), engine_cpus=2) == 2
    )
    assert cpus(engine={"cpus_per_actor": 3}, engine_cpus=1.5) == 1.5
    with pytest.raises(ValueError, match="engine_cpus"):
        ServeConfig(run="r", engine_cpus=0)


def test_other_programs_are_not_held_to_this_machine(not_joined):
    """They may join any cluster after they have built the application."""
    check_fits([Demand("replicas", 1, 1, 10_000)], "")
    check_port()


@pytest.mark.parametrize("reuse", [False, True], ids=["a server", "another Ray Serve"])
def test_a_port_that_is_taken(run, monkeypatch, reuse):
    port = free_port()
    monkeypatch.setattr("ray.serve.config.HTTPOptions", lambda: SimpleNamespace(host="127.0.0.1", port=port))
    assert run(check_port) == (0, "")
    with socket.socket() as server:
        if reuse:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        code, said = run(check_port)
        assert code == 1 and f"port {port}" in said and "http_options.port" in said
        assert run(check_port, "127.0.0.1:6379") == (0, ""), (
            "Ray Serve of a cluster that runs listens there rightly"
        )
    assert run(check_port) == (0, "")


@pytest.mark.ray
@pytest.mark.whole_job
def test_what_a_cluster_may_grow_to_counts(run):
    # Ray's sockets lie in the folder, and their paths must be short.
    with (
        tempfile.TemporaryDirectory(prefix="c", dir="/tmp") as folder,
        FakeCluster(Path(folder), {"generate": (4, 2)}) as cluster,
    ):

        def fits(demand):
            return run(lambda: check_fits([demand], ""), cluster.address)

        assert fits(Demand("replicas", 2, 2, 4, labels={"medray-group": "generate"})) == (0, "")
        assert fits(Demand("replicas", 1, 1, 1, labels={"medray-group": "train"}))[0] == 1
        code, said = fits(Demand("replicas", 3, 3, 4))
        assert code == 1 and "2 x generate (4 CPUs" in said
        assert (
            fits(Demand("replicas", 1, 1, 5))[0] == 1
            and fits(Demand("replicas", 1, 1, 4, resources={"generate": 4}))[0] == 0
        )


@pytest.mark.ray
def test_a_cluster_that_was_joined(ray_cluster, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    check_fits([Demand("replicas", 2, 2, 2)], "")
    with pytest.raises(ConfigError, match="needs at once 3 x"):
        check_fits([Demand("replicas", 3, 3, 2)], "")
