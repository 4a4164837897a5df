"""YAML within limits, and damaged configurations of runs: one error each that names the entry."""

import json
import time

import pytest
import yaml

from pyrovae import data, load_run, priors, save_run
from pyrovae.cli import main
from pyrovae.data import Schema
from pyrovae.documents import MAX_DEPTH, MAX_NODES, read_yaml

LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 1,000,000 values"),
        ("&a [*a]", "stands for nothing, or for a part that contains it"),
        ("[" * 5000, f"deeper than {MAX_DEPTH}"),
        ("a: " + "{b: " * 5000, f"deeper than {MAX_DEPTH}"),
        ("- " * 5000, f"deeper than {MAX_DEPTH}"),
        ("a: [", "no YAML"),
        ("a: !!bool x", "no YAML"),
        ("a: !!timestamp x", "no YAML"),
        ("a: 2021-13-45", "no YAML"),
        ("a: !!int x", "no YAML"),
        ("? [a]\n: 1", "no YAML"),
        ("a: !!python/name:os.system", "no YAML"),
        ("a: \x00", "no YAML"),
    ],
    ids=range(13),
)
def test_what_is_no_document_or_too_large_is_refused_at_once(text, message):
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        read_yaml(text)
    assert time.process_time() - began < 5


def test_aliases_are_counted_as_what_they_stand_for():
    assert read_yaml("a: &x [1, 2]\nb: [*x, *x]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    thousand = "[" + ", ".join("1" * 1000) + "]"
    whole = f"a: &a {thousand}\nb: [{', '.join(['*a'] * (MAX_NODES // 1001 - 2))}]"
    assert len(read_yaml(whole)["b"]) == MAX_NODES // 1001 - 2
    with pytest.raises(ValueError, match="values"):
        read_yaml(whole.replace("b: [", "b: [*a, *a, *a, "))


def test_a_schema_has_the_same_limits():
    with pytest.raises(ValueError, match="the schema is no schema: it is nested deeper"):
        Schema.from_yaml("[" * 5000)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("documents") / "run"
    main(["train", "--run", str(directory), "--epochs", "1", "--num-samples", "10", "--latent-dim", "2"])
    return {file.name: file.read_bytes() for file in directory.iterdir()}


BERNOULLI = "pyrovae.likelihoods.Bernoulli"
HALF_A_UNIT, LESS_THAN_NONE = ({"class_path": "pyrovae.nn.MLP", "init_args": {"hidden": [n]}} for n in (0.5, -1))
DAMAGES = {
    "latent_dim": ["3", True, 2.5, None, 0, -1, [2], {"a": 2}],
    "preprocessing": ["gray", 3, None],
    "data": [3, None, ["digits"]],
    "epochs": ["many", 0],
    "likelihood": [
        None, 3, [], "Norml", {}, {"init_args": {}}, {"class_path": 3}, {"class_path": BERNOULLI, "init_args": [1]},
        {"class_path": "pyrovae.encoders.DiagonalNormal"}, {"class_path": BERNOULLI, "init_args": {"netwrk": 3}},
        {"class_path": BERNOULLI, "init_args": {"network": HALF_A_UNIT}},
        {"class_path": BERNOULLI, "init_args": {"network": LESS_THAN_NONE}},
        {"class_path": BERNOULLI, 3: 4},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in DAMAGES.items() for value in values])
def test_a_damaged_configuration_is_a_value_error_that_names_the_entry(name, value, run, tmp_path):
    for file, content in run.items():
        (tmp_path / file).write_bytes(content)
    config = yaml.safe_load(run["config.yaml"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {name: value}))
    with pytest.raises(ValueError, match=r"config\.yaml") as error:
        load_run(tmp_path)
    named = any(argument in str(error.value) for argument in (name, "hidden"))
    assert named and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["latent_dim", "prior", "likelihood", "encoder", "data", "preprocessing"])
def test_a_missing_entry_is_named(name, run, tmp_path):
    for file, content in run.items():
        (tmp_path / file).write_bytes(content)
    config = yaml.safe_load(run["config.yaml"])
    del config[name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=f"the entry '{name}' is missing"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.yaml", {"latent_dim": 10**9}),
        ("config.yaml", {"latent_dim": 10**18}),
        ("run.json", {"x_shape": [10**9]}),
        ("run.json", {"x_shape": [10**6, 10**6]}),
    ],
)
def test_no_more_memory_is_asked_for_than_the_weights_need(file, change, run, tmp_path):
    for name, content in run.items():
        (tmp_path / name).write_bytes(content)
    if file == "config.yaml":
        (tmp_path / file).write_text(yaml.safe_dump(yaml.safe_load(run[file]) | change))
    else:
        (tmp_path / file).write_text(json.dumps(json.loads(run[file]) | change))
    with pytest.raises(ValueError, match="was edited" if file == "config.yaml" else "cannot be built"):
        load_run(tmp_path)


def test_the_configuration_of_a_vae_of_a_script_holds_its_data_alone(tmp_path):
    from pyrovae import VAE, encoders, likelihoods

    parts = priors.StandardNormal(2), likelihoods.Bernoulli(2, (1, 8, 8)), encoders.DiagonalNormal((1, 8, 8), 2)
    save_run(VAE(*parts), tmp_path / "run", data="digits", preprocessing="dynamic")
    assert load_run(tmp_path / "run")[1]["data"] in data.descriptions()
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text + "prior: {class_path: pyrovae.priors.StandardNormal}\n")
    with pytest.raises(ValueError, match="'prior' is no entry"):
        load_run(tmp_path / "run")
