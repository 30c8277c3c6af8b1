"""The deploy files have the shape that Ray's launcher and the KubeRay operator read, and name things that exist.

The models below describe only the fields that the files use; a field that is not in them is refused, so a misspelt one
fails here and not on a cluster.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from orchestrator.cluster import needs
from orchestrator.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
IMAGE_FOLDER = "/tutelage/"
"""Where deploy/Dockerfile puts the checkout."""


class Strict(BaseModel):
    """Snake case, as Ray's launcher writes it; nothing beyond the fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Camel(Strict):
    """Camel case, as Kubernetes writes it."""

    model_config = ConfigDict(alias_generator=to_camel)


class Provider(Strict):
    type: Literal["aws"]
    region: str
    cache_stopped_nodes: bool


class Auth(Strict):
    ssh_user: str


class Docker(Strict):
    image: str
    container_name: str
    pull_before_run: bool
    run_options: list[str]


class NodeConfig(Strict):
    instance_type: str = Field(alias="InstanceType")


class NodeType(Strict):
    resources: dict[Literal["CPU", "GPU"], int]
    node_config: NodeConfig
    min_workers: int = 0
    max_workers: int = 0


class LauncherFile(Strict):
    cluster_name: str
    max_workers: int
    idle_timeout_minutes: int
    provider: Provider
    auth: Auth
    docker: Docker
    available_node_types: dict[str, NodeType]
    head_node_type: str
    file_mounts: dict[str, str]
    head_start_ray_commands: list[str]
    worker_start_ray_commands: list[str]


class Resources(Strict):
    requests: dict[Literal["cpu", "memory", "nvidia.com/gpu"], str]
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], str]


class Variable(Strict):
    name: str
    value: str


class Port(Camel):
    name: str
    container_port: int


class VolumeMount(Camel):
    name: str
    mount_path: str


class Container(Camel):
    name: str
    image: str
    env: list[Variable] = []
    ports: list[Port] = []
    resources: Resources
    volume_mounts: list[VolumeMount] = []


class Claim(Camel):
    claim_name: str


class MemoryFolder(Camel):
    medium: Literal["Memory"]
    size_limit: str


class Volume(Camel):
    name: str
    persistent_volume_claim: Claim | None = None
    empty_dir: MemoryFolder | None = None


class PodSpec(Camel):
    containers: list[Container]
    volumes: list[Volume] = []
    restart_policy: Literal["Never"] | None = None


class Pod(Camel):
    spec: PodSpec


class HeadGroup(Camel):
    ray_start_params: dict[str, str]
    template: Pod


class WorkerGroup(HeadGroup):
    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int


class AuthOptions(Strict):
    mode: Literal["token"]


class Cluster(Camel):
    ray_version: str
    auth_options: AuthOptions
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class JobSpec(Camel):
    entrypoint: str
    submission_mode: Literal["K8sJobMode"]
    backoff_limit: int
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int
    ray_cluster_spec: Cluster
    submitter_pod_template: Pod


class Metadata(Strict):
    name: str


class RayJob(Camel):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


SHAPES: dict[str, type[Strict]] = {"cluster.yaml": LauncherFile, "kubernetes/rayjob.yaml": RayJob}


def contents(name: str) -> Any:
    """Return the parsed file of the deploy folder."""
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def misspellings(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield the document once for each of its keys, with that key misspelt; nested keys included."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield key, {(f"{k}x" if k == key else k): v for k, v in document.items()}
            for inner, changed in misspellings(value):
                yield f"{key}.{inner}", {**document, key: changed}
    elif isinstance(document, list):
        for index, value in enumerate(document):
            for inner, changed in misspellings(value):
                yield f"{index}.{inner}", [*document[:index], changed, *document[index + 1 :]]


def pods(job: RayJob) -> list[PodSpec]:
    """Return the head's, the workers' and the submitter's pods."""
    cluster = job.spec.ray_cluster_spec
    groups: list[HeadGroup] = [cluster.head_group_spec, *cluster.worker_group_specs]
    return [*(group.template.spec for group in groups), job.spec.submitter_pod_template.spec]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_deploy_file_has_its_shape(name: str) -> None:
    SHAPES[name].model_validate(contents(name))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_any_misspelt_field_of_a_deploy_file_is_refused(name: str) -> None:
    # Keys that the file's author makes up: any name is right there.
    free = re.compile(r"(available_node_types|file_mounts|rayStartParams)\.[^.]+(/.*)?$")
    tried = 0
    for path, changed in misspellings(deepcopy(contents(name))):
        if not free.search(path):
            tried += 1
            with pytest.raises(ValidationError):
                SHAPES[name].model_validate(changed)
    assert tried >= 20


def test_every_yaml_file_of_the_deploy_folder_is_a_recipe_or_has_a_shape() -> None:
    names = {path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*.yaml")}
    assert {name for name in names if not name.startswith("recipes/")} == set(SHAPES)


@pytest.mark.parametrize(
    "path", ["deploy/cluster.yaml", "deploy/kubernetes/rayjob.yaml", "deploy/README.md", "Makefile"]
)
def test_every_recipe_that_a_file_names_exists(path: str) -> None:
    named = set(re.findall(r"deploy/recipes/[\w.-]+\.yaml", (ROOT / path).read_text(encoding="utf-8")))
    assert named
    assert [recipe for recipe in sorted(named) if not (ROOT / recipe).is_file()] == []


def test_the_job_finds_its_recipe_in_the_image() -> None:
    recipe = RayJob.model_validate(contents("kubernetes/rayjob.yaml")).spec.entrypoint.split()[2]
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert f"WORKDIR {IMAGE_FOLDER.rstrip('/')}\n" in dockerfile
    assert recipe.startswith(IMAGE_FOLDER)
    assert (ROOT / recipe.removeprefix(IMAGE_FOLDER)).is_file()


def test_the_workers_of_the_job_hold_every_actor_of_its_recipe() -> None:
    job = RayJob.model_validate(contents("kubernetes/rayjob.yaml"))
    _, _, recipe, *overrides = job.spec.entrypoint.split()
    needed = needs(load_recipe(ROOT / recipe.removeprefix(IMAGE_FOLDER), overrides))
    for resource, amount in (("cpu", "num_cpus"), ("nvidia.com/gpu", "num_gpus")):
        groups = job.spec.ray_cluster_spec.worker_group_specs
        offered = sum(int(g.template.spec.containers[0].resources.limits[resource]) * g.replicas for g in groups)
        assert sum(need.num_actors * getattr(need, amount) for need in needed) <= offered


def test_the_deploy_files_agree_on_one_image_and_on_the_pinned_ray() -> None:
    job = RayJob.model_validate(contents("kubernetes/rayjob.yaml"))
    launcher = LauncherFile.model_validate(contents("cluster.yaml"))
    images = {container.image for pod in pods(job) for container in pod.containers}
    assert images == {launcher.docker.image}
    assert f"ray=={job.spec.ray_cluster_spec.ray_version}\n" in (DEPLOY / "constraints.txt").read_text()


def test_every_mounted_volume_of_the_job_is_declared() -> None:
    for pod in pods(RayJob.model_validate(contents("kubernetes/rayjob.yaml"))):
        mounted = {mount.name for container in pod.containers for mount in container.volume_mounts}
        assert mounted == {volume.name for volume in pod.volumes}


def test_every_node_of_the_launched_cluster_asks_for_the_token() -> None:
    launcher = LauncherFile.model_validate(contents("cluster.yaml"))
    commands = [*launcher.head_start_ray_commands, *launcher.worker_start_ray_commands]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith("RAY_AUTH_MODE=token ray start") for command in starts)
    assert launcher.head_node_type in launcher.available_node_types
