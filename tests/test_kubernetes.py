"""The documents of cluster/kubernetes/: their fields, versions and permissions, and the files of the image."""

import copy
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_documents import FOLDER, read_document, read_job

REPO = Path(__file__).parents[1]
KUBERNETES = "1.34"
NAMES = ["rayjob-train", "rayjob-score", "raycronjob-score"]
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
# Fields of autoscalerOptions that are fields of a container.
CONTAINER_FIELDS = ("resources", "securityContext", "env", "envFrom", "volumeMounts")

Document = dict[str, Any]


def refuse_unknown_fields(schema: Any) -> Any:
    """Add `additionalProperties: false` to every object of a schema that lists its fields."""
    if isinstance(schema, list):
        return [refuse_unknown_fields(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: refuse_unknown_fields(value) for key, value in schema.items()}
    return (
        {"additionalProperties": False} | strict
        if schema.get("type") == "object" and "properties" in schema
        else strict
    )


KUBERAY = jsonschema.Draft202012Validator(
    refuse_unknown_fields(yaml.safe_load((REPO / "tests" / "data" / "kuberay.yaml").read_text()))
)


def list_pods(document: Document) -> Iterator[Document]:
    """List the pod templates of a document; the last one is that of the autoscaler's container."""
    job = document["spec"].get("jobTemplate", document["spec"])
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    yield from (group["template"] for group in groups if "template" in group)
    yield job["submitterPodTemplate"]
    options = cluster["autoscalerOptions"]
    yield {"spec": {"containers": [{"name": "autoscaler"} | {k: options[k] for k in CONTAINER_FIELDS if k in options}]}}


def list_errors(document: Document) -> list[str]:
    """List where a document differs from the schemas of KubeRay and of Kubernetes."""
    errors = [error.message for error in KUBERAY.iter_errors(document)]
    for template in list_pods(document):
        errors += find_kubernetes_error({"apiVersion": "v1", "kind": "PodTemplate", "template": template})
    return errors


def find_kubernetes_error(document: Document) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_the_documents_have_no_schema_errors(name):
    assert list_errors(read_document(name)) == []


def test_the_accounts_have_no_schema_errors():
    accounts = list(yaml.safe_load_all((FOLDER / "accounts.yaml").read_text()))
    assert [account["kind"] for account in accounts] == ["ServiceAccount"] * 2
    assert [find_kubernetes_error(account) for account in accounts] == [[], []]


def edit(document: Document, path: str, name: str, value: Any = ...) -> Document:
    """Rename the field at a path, or set it to a value."""
    edited = copy.deepcopy(document)
    *parents, field = path.split(".")
    place = edited
    for step in parents:
        place = place[int(step) if step.isdecimal() else step]
    place[name] = place.pop(field) if value is ... else value
    return edited


HEAD, WORKER = "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("path", "name", "value", "message"),
    [
        ("spec.shutdownAfterJobFinishes", "shutdownAfterJobFinish", ..., "'shutdownAfterJobFinish' was unexpected"),
        ("spec.backoffLimit", "backoffLimit", "3", "'3' is not of type 'integer'"),
        ("spec.rayClusterSpec.authOptions.mode", "mode", "tokens", "'tokens' is not one of"),
        (
            "spec.rayClusterSpec.autoscalerOptions.securityContext",
            "securityContext",
            {"root": 0},
            "'root' was unexpected",
        ),
        (f"{WORKER}.minReplicas", "minReplica", ..., "'minReplica' was unexpected"),
        (f"{WORKER}.template", "templates", ..., "'template' is a required property"),
        (f"{HEAD}.rayStartParams.num-cpus", "num-cpus", 0, "0 is not of type 'string'"),
        (f"{HEAD}.template.spec.containers", "contaners", ..., "'containers' is a required property"),
        (f"{WORKER}.template.spec.volumes.0.emptyDir.sizeLimit", "size", ..., "'size' was unexpected"),
        ("spec.submitterPodTemplate.spec.containers.0.image", "image", 1, "1 is not of type"),
    ],
)
def test_a_planted_mistake_is_found(path, name, value, message):
    errors = list_errors(edit(read_document("rayjob-train"), path, name, value))
    assert any(message in error for error in errors), errors


def test_the_nightly_job_is_the_scoring_job():
    nightly, once = read_document("raycronjob-score")["spec"]["jobTemplate"], read_document("rayjob-score")["spec"]
    assert nightly == once


def test_the_second_command_of_training_resumes_the_first():
    first, second = read_job("rayjob-train")["entrypoint"].removeprefix("bash -c '").removesuffix("'").split("||")
    assert second.split() == [*first.split(), "--resume"]


def test_image_lock_and_cluster_have_one_ray_and_one_python():
    (locked,) = re.findall(r"^ray==(\S+) ", (REPO / "requirements.lock").read_text(), re.MULTILINE)
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    assert base == yaml.safe_load((REPO / "cluster.yaml").read_text())["docker"]["image"]
    ray, python = re.fullmatch(r"rayproject/ray:(.*)-(py3\d+)-gpu", base).groups()
    for name in NAMES:
        images = {
            container["image"]
            for pod in list_pods(read_document(name))
            for container in pod["spec"]["containers"]
            if "image" in container
        }
        assert images == {f"EXAMPLE-REGISTRY/catsdogs:ray{ray}-{python}"}
        assert read_job(name)["rayClusterSpec"]["rayVersion"] == ray == locked


@pytest.mark.parametrize("name", NAMES)
def test_no_container_can_become_root(name):
    for pod in list_pods(read_document(name)):
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        if container["name"] != "autoscaler":  # in the head's pod
            assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
            assert f"USER {pod['spec']['securityContext']['runAsUser']}:" in DOCKERFILE


@pytest.mark.parametrize("name", NAMES)
def test_the_head_runs_no_tasks_and_workers_start_on_demand(name):
    cluster = read_job(name)["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert cluster["enableInTreeAutoscaling"] is True
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"]) == (0, 0)
    wanted = re.findall(r"--num-(?:workers|actors) (\d+)", read_job(name)["entrypoint"])
    assert workers["maxReplicas"] >= max(map(int, wanted))


@pytest.mark.parametrize("name", NAMES)
def test_access_is_by_token_and_by_service_account(name):
    cluster = read_job(name)["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    accounts = {a["metadata"]["name"]: a for a in yaml.safe_load_all((FOLDER / "accounts.yaml").read_text())}
    head, worker = (spec["template"]["spec"] for spec in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]))
    assert {head["serviceAccountName"], worker["serviceAccountName"]} == accounts.keys()
    assert worker["automountServiceAccountToken"] is False  # the head's autoscaler needs it
    assert not re.search("AWS_(ACCESS|SECRET)", (FOLDER / f"{name}.yaml").read_text())


def to_gibibytes(quantity: str) -> float:
    return float(re.fullmatch(r"(\d+)Gi", quantity)[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_object_store_fits_into_dev_shm(name):
    cluster = read_job(name)["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        (volume,) = spec["volumes"]
        (container,) = spec["containers"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert volume["emptyDir"]["medium"] == "Memory"
        memory = to_gibibytes(container["resources"]["limits"]["memory"])
        assert 0.3 * memory <= to_gibibytes(volume["emptyDir"]["sizeLimit"]) < memory  # Ray's default: 30%


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_job_is_retried_and_its_cluster_deleted(name):
    job = read_job(name)
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"] is True
    assert job["ttlSecondsAfterFinished"] > 0


def test_the_image_installs_the_lock_with_hashes_and_the_package_with_its_files(tmp_path):
    """The files that the Dockerfile copies suffice to build the package."""
    assert re.search(
        r"^RUN pip install .*--require-hashes -r /tmp/catsdogs/requirements.lock$", DOCKERFILE, re.MULTILINE
    )
    for sources in re.findall(r"^COPY --chown=1000:100 (.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in map(REPO.joinpath, sources.split()):
            copy_to = shutil.copytree if source.is_dir() else shutil.copy
            copy_to(source, tmp_path / source.name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        tmp_path,
    ]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = [*(REPO / "jobs").glob("*.py"), *(p for p in (REPO / "catsdogs").rglob("*.*") if p.suffix != ".pyc")]
    assert {path.relative_to(REPO).as_posix() for path in wanted} <= packed
