"""Where stages may run: from the configuration to what Ray is asked for. By default nothing is asked."""

import pytest

from medray.config import (
    ClinicianPreferenceConfig,
    DpoConfig,
    EngineConfig,
    InstructionFreeTrainConfig,
    Placement,
    SelfTrainingConfig,
    SftConfig,
    load_config,
)
from medray.errors import ConfigError
from medray.methods.clinician_preference import stages as steps
from medray.running.run import digest

PLACE = Placement(labels={"medray-group": "train"}, accelerator="in(A100,H100)", memory_gib=1.5)
SELECTOR = {"medray-group": "train", "ray.io/accelerator-type": "in(A100,H100)"}


def test_options_for_ray():
    assert Placement().options == {}
    assert PLACE.options == {"label_selector": SELECTOR, "memory": 1_610_612_736}
    assert Placement(memory_gib=1).options == {"memory": 2**30}
    assert Placement(resources={"medray-train": 1}).options == {"resources": {"medray-train": 1}}


def test_training_workers_take_custom_resources():
    """Ray Train counts room for workers by resources, and not by labels."""
    from medray.train.worker import scaling_of

    config = SftConfig(
        num_workers=(1, 4),
        cpus_per_worker=2,
        place=Placement(labels={"medray-group": "train"}, resources={"medray-train": 1}),
    )
    scaling = scaling_of(config)
    assert (scaling.resources_per_worker, scaling.label_selector) == (
        {"CPU": 2, "medray-train": 1},
        {"medray-group": "train"},
    )


@pytest.mark.parametrize("name", ["CPU", "GPU", "memory", "object_store_memory"])
def test_resources_with_fields_of_their_own_are_refused(name):
    with pytest.raises(ConfigError, match=rf"sft\.place: .*resources: {name} is built in"):
        load_config(SelfTrainingConfig, None, [f"sft.place.resources={{{name}: 1}}"])


def test_the_configuration_takes_places():
    config = load_config(
        SelfTrainingConfig,
        None,
        ["sft.place.labels={medray-group: train}", "engine.place.accelerator=L4", "dpo.place.memory_gib=8"],
    )
    assert (config.sft.place.selector, config.engine.place.selector, config.dpo.place.memory_gib) == (
        {"medray-group": "train"},
        {"ray.io/accelerator-type": "L4"},
        8,
    )


@pytest.mark.parametrize(
    "value", ["{zone: 'in()'}", "{zone: '-a'}", "{zone: 'a b'}", "{'-zone': a}", "{zone: '!!a'}"]
)
def test_what_is_no_selector_is_refused_before_anything_starts(value):
    """Ray itself says so only when the first worker is asked for."""
    from ray._private.label_utils import validate_label_selector

    with pytest.raises(ConfigError, match=r"sft\.place: .* is no label selector"):
        load_config(SelfTrainingConfig, None, [f"sft.place.labels={value}"])
    import yaml

    assert validate_label_selector(yaml.safe_load(value)) is not None


@pytest.mark.parametrize("value", ["a", "!a", "in(a,b)", "in(a, b)", "!in(a,b-2.x)", "A100-80G"])
def test_what_ray_takes_is_taken(value):
    from ray._private.label_utils import validate_label_selector

    assert validate_label_selector({"medray/group": value}) is None
    assert Placement(labels={"medray/group": value}).selector == {"medray/group": value}


@pytest.mark.parametrize("cls", [SftConfig, DpoConfig, InstructionFreeTrainConfig, EngineConfig])
def test_a_place_is_no_part_of_a_stages_inputs(cls):
    """Runs from before there were places continue, and a run continues on other nodes."""
    before = {name: value for name, value in cls().model_dump(mode="json").items() if name != "place"}
    assert digest({"train": cls()}) == digest({"train": before})
    assert digest({"train": cls(place=PLACE)}) == digest({"train": before})
    assert cls(place=PLACE).model_dump()["place"]["labels"] == {"medray-group": "train"}, (
        "the run's config.yaml has it all the same"
    )


def test_nor_where_a_stage_names_the_fields_it_depends_on():
    here = ClinicianPreferenceConfig()
    there = load_config(
        ClinicianPreferenceConfig,
        None,
        ["rater.place.accelerator=L4", "score.place.accelerator=L4", "demonstrations.place.accelerator=L4"],
    )
    for inputs in (
        steps.embed_inputs,
        steps.draw_inputs,
        steps.score_inputs,
        lambda config: steps.rater_inputs(config.rater),
    ):
        assert digest(inputs(here)) == digest(inputs(there))


def test_training_workers():
    from medray.train.worker import scaling_of

    default = scaling_of(SftConfig(num_workers=2, cpus_per_worker=3))
    assert (default.num_workers, default.use_gpu, default.resources_per_worker, default.label_selector) == (
        2,
        False,
        {"CPU": 3},
        None,
    )
    placed = scaling_of(SftConfig(num_workers=(1, 4), gpus_per_worker=1, cpus_per_worker=0, place=PLACE))
    assert placed.label_selector == SELECTOR and placed.use_gpu
    assert placed.resources_per_worker == {"CPU": 0, "GPU": 1, "memory": 1_610_612_736}


def test_engines_and_those_who_wait_for_an_endpoint():
    from medray.running.actor_pools import client_options, map_options

    default = map_options(EngineConfig())
    assert "label_selector" not in default and "memory" not in default
    placed = EngineConfig(gpus_per_actor=1, place=PLACE)
    assert (
        map_options(placed)["label_selector"] == SELECTOR and map_options(placed)["memory"] == 1_610_612_736
    )
    client = client_options(placed)
    assert "label_selector" not in client and "memory" not in client and client["num_gpus"] == 0, (
        "waiting needs no GPU node"
    )


def test_the_session_places_reading_and_writing(ray_cluster):
    from medray.config import ClusterConfig
    from medray.running.ray_session import ray_session

    context = ray_cluster.data.DataContext.get_current()
    with ray_session(ClusterConfig(data_labels={"medray-group": "data"})):
        assert context.execution_options.label_selector == {"medray-group": "data"}
    with ray_session(ClusterConfig()):
        assert context.execution_options.label_selector is None


def test_an_actors_own_label_goes_before_datas(ray_cluster):
    """Data is placed on nodes that do not exist; the actor names the same label, and runs."""
    (node,) = [node["NodeID"] for node in ray_cluster.nodes()]
    context = ray_cluster.data.DataContext.get_current()
    context.execution_options.label_selector = {"ray.io/node-id": "none"}
    try:
        rows = ray_cluster.data.from_items([{"id": number} for number in range(3)])
        place = Placement(labels={"ray.io/node-id": node}, memory_gib=0.01)
        made = rows.map_batches(lambda batch: {"twice": batch["id"] * 2}, num_cpus=0.5, **place.options)
        assert sorted(row["twice"] for row in made.iter_rows()) == [0, 2, 4]
    finally:
        context.execution_options.label_selector = None


def test_training_reads_where_data_is_placed(ray_cluster):
    """Ray Train's own options for reading leave the label out; ours keep it."""
    from medray.train.global_batches import UnequalSplits

    rows = ray_cluster.data.range(4)
    rows.context.execution_options.label_selector = {"medray-group": "data"}
    options = UnequalSplits().options_of("train", rows)
    assert options.label_selector == {"medray-group": "data"} and options.preserve_order
