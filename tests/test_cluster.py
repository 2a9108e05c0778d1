"""`ray up cluster.yaml` with Ray's own launcher, up to its requests to EC2, which moto serves."""

import copy
import gc
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private import commands, providers
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import utils as aws_clients
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter

REPO = Path(__file__).parents[1]
CLUSTER_YAML = (REPO / "cluster.yaml").read_text()  # perhaps edited, as the documentation says
REGION = yaml.safe_load(CLUSTER_YAML)["provider"]["region"]
SSH = json.loads((REPO / "cluster" / "ssh.json").read_text())
NODE_TYPES = ["head", "gpu", "gpu_spot"]

# Ray leaves two files open: the config that it reads, and the one that it writes for the head.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*(cluster.yaml|ray-bootstrap-):ResourceWarning")

Config = dict[str, Any]


def read_policy(name: str) -> list[Config]:
    return json.loads((REPO / "cluster" / f"{name}.json").read_text())["Statement"]


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def actions(statements: list[Config]) -> set[str]:
    return {action for statement in statements for action in as_list(statement["Action"])}


@dataclass
class Cluster:
    """The config that Ray resolved, and the requests that it sent.

    Attributes:
        requests: to EC2, in order: operation, parameters.
        updaters: arguments of Ray's installers of nodes.
        as_head: the config that `ray up` sends to the head.
        head_operations: that the head's autoscaler requested.
        profiles: instance profile by node type.
    """

    security_group: str
    config: Config = field(default_factory=dict)
    requests: list[tuple[str, Config]] = field(default_factory=list)
    updaters: list[Config] = field(default_factory=list)
    as_head: Config = field(default_factory=dict)
    head_operations: set[str] = field(default_factory=set)
    profiles: dict[str, str] = field(default_factory=dict)

    def find_launch(self, node_type: str) -> Config:
        """Return the RunInstances parameters of the only launch of a node type."""
        (launch,) = [
            parameters
            for operation, parameters in self.requests
            if operation == "RunInstances" and read_tags(parameters)["ray-user-node-type"] == node_type
        ]
        return launch


def read_tags(launch: Config) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in launch["TagSpecifications"][0]["Tags"]}


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Create an empty AWS account in this process, and a home directory with a token."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0" * 64)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "BOTO_", "RAY_AUTH_"))]:
            patch.delenv(name)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_USAGE_STATS_PROMPT_ENABLED", "0")
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(boto3, "DEFAULT_SESSION", None)
        patch.chdir(REPO)
        clear_client_caches()
        with mock_aws():
            create_roles()
            yield patch
        clear_client_caches()


def clear_client_caches() -> None:
    aws_clients.resource_cache.cache_clear()
    aws_clients.client_cache.cache_clear()
    aws_config._get_subnets_or_die.cache_clear()
    providers._clear_provider_cache()


def ssh_networks() -> list[str]:
    return [ip_range["CidrIp"] for rule in SSH for ip_range in rule["IpRanges"]]


def create_roles() -> None:
    """Create the roles, as the documentation does with the AWS command line."""
    iam = boto3.client("iam", REGION)
    for role in ("catsdogs-head", "catsdogs-worker"):
        trust = (REPO / "cluster" / "trust.json").read_text()
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=trust)
        for policy in ["storage", "launch"] if role == "catsdogs-head" else ["storage"]:
            document = (REPO / "cluster" / f"{policy}.json").read_text()
            iam.put_role_policy(RoleName=role, PolicyName=policy, PolicyDocument=document)
        iam.create_instance_profile(InstanceProfileName=role)
        iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)


def create_security_group() -> str:
    ec2 = boto3.client("ec2", REGION)
    group = ec2.create_security_group(GroupName="catsdogs", Description="catsdogs Ray cluster")["GroupId"]
    between_nodes = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[*SSH, between_nodes])
    return group


def bootstrap(config: Config) -> Config:
    """Resolve a config against the account: the part of `ray up` before the first launch."""
    clear_client_caches()
    return aws_config.bootstrap_aws(commands.prepare_config(config))


def ray_up(path: Path) -> Config:
    """Run `ray up --yes --no-config-cache`."""
    return commands.create_or_update_cluster(
        str(path), None, None, no_restart=False, restart_only=False, yes=True, no_config_cache=True
    )


def launch_as_head(cluster: Cluster, node_type: str) -> None:
    """Launch one worker as the head's autoscaler does, from the config that `ray up` sends it."""
    autoscaling = AutoscalingConfig(cluster.as_head, skip_content_hash=True)

    class Reader:
        def get_cached_autoscaling_config(self) -> AutoscalingConfig:
            return autoscaling

    provider = providers._get_node_provider(cluster.as_head["provider"], cluster.as_head["cluster_name"])
    adapter = NodeProviderAdapter(provider, Reader())
    adapter._launch_nodes_by_type(node_type, 1, "request")
    assert adapter.poll_errors() == []


def read_profiles() -> dict[str, str]:
    """Read the instance profile of each node type from EC2, in a session that is not recorded."""
    reservations = boto3.Session().client("ec2", REGION).describe_instances()["Reservations"]
    instances = [instance for reservation in reservations for instance in reservation["Instances"]]
    return {
        tag["Value"]: instance["IamInstanceProfile"]["Arn"]
        for instance in instances
        for tag in instance["Tags"]
        if tag["Key"] == "ray-user-node-type"
    }


def scale_as_head(cluster: Cluster) -> None:
    """Launch a worker of each type, mark one as ready, and terminate them."""
    num_requests = len(cluster.requests)
    for node_type in ("gpu", "gpu_spot"):
        launch_as_head(cluster, node_type)
    cluster.profiles = read_profiles()
    provider = providers._get_node_provider(cluster.as_head["provider"], cluster.as_head["cluster_name"])
    workers = provider.non_terminated_nodes({"ray-node-type": "worker"})
    provider.set_node_tags(workers[0], {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(workers)
    cluster.head_operations = {operation for operation, _ in cluster.requests[num_requests:]}


def build_updater(cluster: Cluster) -> type:
    """Build a stand-in for Ray's installer of a node, which records its arguments."""

    class Updater:
        exitcode = 0

        def __init__(self, **arguments: Any) -> None:
            cluster.updaters.append(arguments)
            cluster.as_head = json.loads(Path(arguments["file_mounts"]["~/ray_bootstrap_config.yaml"]).read_text())

        def start(self) -> None: ...

        def join(self) -> None: ...

    return Updater


@pytest.fixture(scope="module")
def cluster(aws: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Run `ray up`, then launch and terminate one worker of each type."""
    cluster = Cluster(create_security_group())

    def record(params: Config, model: Any, **_: Any) -> None:
        cluster.requests.append((model.name, copy.deepcopy(params)))

    clear_client_caches()
    boto3.setup_default_session()
    boto3.DEFAULT_SESSION.events.register("provide-client-params.ec2", record)
    aws.setattr(commands, "NodeUpdaterThread", build_updater(cluster))
    aws.setattr("ray.autoscaler._private.aws.node_provider.TAG_BATCH_DELAY", 0)
    path = tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    (unknown_group,) = yaml.safe_load(CLUSTER_YAML)["metadata"]["security_groups"]
    path.write_text(CLUSTER_YAML.replace(unknown_group, cluster.security_group))
    cluster.config = ray_up(path)
    home = Path(os.environ["HOME"])
    shutil.copy(home / ".ssh" / "catsdogs.pem", home / "ray_bootstrap_key.pem")
    scale_as_head(cluster)
    gc.collect()  # or the open file would raise its warning in some later test
    return cluster


@pytest.mark.parametrize("node_type", NODE_TYPES)
def test_every_node_requires_imdsv2_with_one_hop(cluster: Cluster, node_type: str) -> None:
    options = cluster.find_launch(node_type)["MetadataOptions"]
    assert (options["HttpTokens"], options["HttpPutResponseHopLimit"]) == ("required", 1)


@pytest.mark.parametrize("node_type", NODE_TYPES)
def test_every_disk_is_encrypted(cluster: Cluster, node_type: str) -> None:
    (disk,) = cluster.find_launch(node_type)["BlockDeviceMappings"]
    assert disk["Ebs"]["Encrypted"] is True
    assert disk["Ebs"]["VolumeType"] == "gp3"


@pytest.mark.parametrize(
    ("node_type", "profile"),
    [("head", "catsdogs-head"), ("gpu", "catsdogs-worker"), ("gpu_spot", "catsdogs-worker")],
)
def test_head_and_workers_have_different_roles(cluster: Cluster, node_type: str, profile: str) -> None:
    assert cluster.find_launch(node_type)["IamInstanceProfile"] == {"Name": profile}
    assert cluster.profiles[node_type].endswith(f":instance-profile/{profile}")


@pytest.mark.parametrize("node_type", NODE_TYPES)
def test_every_node_is_in_our_security_group_with_our_key(cluster: Cluster, node_type: str) -> None:
    launch = cluster.find_launch(node_type)
    assert launch["SecurityGroupIds"] == [cluster.security_group]
    assert launch["KeyName"] == "catsdogs"


def test_only_its_owner_can_read_the_private_key(cluster: Cluster) -> None:
    key = Path(cluster.config["auth"]["ssh_private_key"])
    assert key == Path(os.environ["HOME"]) / ".ssh" / "catsdogs.pem"
    assert key.stat().st_mode & 0o777 == 0o600


def test_only_ssh_from_one_network_is_open_to_the_outside(cluster: Cluster) -> None:
    group = boto3.resource("ec2", REGION).SecurityGroup(cluster.security_group)
    from_outside = [
        (rule["IpProtocol"], rule["FromPort"], rule["ToPort"], ip_range["CidrIp"])
        for rule in group.ip_permissions
        for ip_range in rule["IpRanges"] + rule.get("Ipv6Ranges", [])
    ]
    assert from_outside == [("tcp", 22, 22, cidr) for cidr in ssh_networks()]
    assert "0.0.0.0/0" not in ssh_networks()
    assert not {"CreateSecurityGroup", "AuthorizeSecurityGroupIngress"} & {o for o, _ in cluster.requests}


def test_ray_refuses_the_placeholder_of_the_security_group(
    aws: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        bootstrap(yaml.safe_load(CLUSTER_YAML))
    assert "Failed to detect a security group" in "".join(capsys.readouterr())


def test_a_security_group_created_by_ray_is_open_to_everyone(aws: pytest.MonkeyPatch) -> None:
    """The reason for a group of our own: Ray adds an open rule to the given ones."""
    config = yaml.safe_load(CLUSTER_YAML)
    for node_type in config["available_node_types"].values():
        node_type["node_config"].pop("SecurityGroupIds", None)  # two types share one dict
    config["provider"]["security_group"] = {"GroupName": "made-by-ray", "IpPermissions": SSH}
    (group,) = bootstrap(config)["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    rules = boto3.resource("ec2", REGION).SecurityGroup(group).ip_permissions
    assert {"0.0.0.0/0", *ssh_networks()} == {r["CidrIp"] for rule in rules for r in rule["IpRanges"]}


def test_only_the_spot_type_is_spot(cluster: Cluster) -> None:
    market = {node_type: cluster.find_launch(node_type).get("InstanceMarketOptions") for node_type in NODE_TYPES}
    assert market == {"head": None, "gpu": None, "gpu_spot": {"MarketType": "spot"}}


def test_workers_have_gpus_and_the_head_runs_no_tasks(cluster: Cluster) -> None:
    resources = {name: t["resources"] for name, t in cluster.config["available_node_types"].items()}
    assert resources["head"] == {"CPU": 0}
    for worker in ("gpu", "gpu_spot"):
        assert resources[worker]["GPU"] >= 1
        assert resources[worker]["CPU"] >= 1


def test_workers_start_on_demand_and_in_one_market(cluster: Cluster) -> None:
    types = cluster.config["available_node_types"]
    assert [types[name]["min_workers"] for name in NODE_TYPES] == [0, 0, 0]
    max_workers = [types[name]["max_workers"] for name in ("gpu", "gpu_spot")]
    assert sorted(max_workers) == [0, cluster.config["max_workers"]]


def test_images_have_the_locked_ray_and_the_same_python(cluster: Cluster) -> None:
    autoscaling = AutoscalingConfig(cluster.as_head, skip_content_hash=True)
    images = {name: autoscaling.get_docker_config(name)["image"] for name in NODE_TYPES}
    (version,) = re.findall(r"^ray==(\S+) ", (REPO / "requirements.lock").read_text(), re.MULTILINE)
    tag = re.escape(f"rayproject/ray:{version}-") + r"py3(\d+)-(cpu|gpu)"
    found = {name: re.fullmatch(tag, image) for name, image in images.items()}
    assert {name: match and match[2] for name, match in found.items()} == {
        "head": "cpu",
        "gpu": "gpu",
        "gpu_spot": "gpu",
    }
    (minor,) = {int(match[1]) for match in found.values() if match}
    assert minor >= 11
    assert cluster.updaters[0]["docker_config"]["head_image"] == images["head"]


def test_the_dashboard_listens_on_loopback_only(cluster: Cluster) -> None:
    (start,) = [c for c in cluster.updaters[0]["ray_start_commands"] if "ray start" in c]
    assert re.findall(r"--dashboard-host[= ](\S+)", start) == ["127.0.0.1"]


@pytest.mark.parametrize("where", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_starts_with_token_authentication(cluster: Cluster, where: str) -> None:
    (start,) = [command for command in cluster.as_head[where] if "ray start" in command]
    assert start.index("export RAY_AUTH_MODE=token;") < start.index("ray start")


def test_workers_watch_for_the_notice_of_spot_instances_once_ray_has_started(cluster: Cluster) -> None:
    mount = cluster.updaters[0]["file_mounts"]["/home/ray/catsdogs/spot_notice.py"]
    assert (REPO / mount).is_file()
    *_, start, watch = cluster.as_head["worker_start_ray_commands"]
    assert "ray start --address=$RAY_HEAD_IP:6379" in start
    assert watch.startswith(
        "export RAY_AUTH_MODE=token; nohup python ~/catsdogs/spot_notice.py --address $RAY_HEAD_IP:6379 "
    )
    assert watch.endswith("< /dev/null &")


def test_the_token_is_copied_to_where_ray_reads_it(cluster: Cluster) -> None:
    updater = cluster.updaters[0]
    assert updater["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in updater["setup_commands"]
    assert "chmod 600 ~/.ray/auth_token" in cluster.as_head["worker_setup_commands"]
    assert cluster.as_head["file_mounts"]["/home/ray/.ray/auth_token"] == "/home/ray/.ray/auth_token"
    assert "0" * 64 not in json.dumps(cluster.as_head)


def test_nodes_install_the_lock_file(cluster: Cluster) -> None:
    mount = "/home/ray/catsdogs/requirements.lock"
    assert (REPO / cluster.updaters[0]["file_mounts"][mount]).is_file()
    for setup in (cluster.updaters[0]["setup_commands"], cluster.as_head["worker_setup_commands"]):
        assert any(
            c.startswith("pip install") and "--require-hashes -r ~/catsdogs/requirements.lock" in c for c in setup
        )


def test_no_policy_grants_everything() -> None:
    texts = [path.read_text() for path in [REPO / "cluster.yaml", *(REPO / "cluster").glob("*.json")]]
    assert not any("FullAccess" in text for text in texts)
    statements = read_policy("storage") + read_policy("launch")
    assert not [action for action in actions(statements) if "*" in action]
    anywhere = [s for s in statements if "*" in as_list(s["Resource"])]
    assert actions(anywhere) == {"ec2:DescribeInstances"}


def test_only_the_policy_of_the_head_grants_machines_and_roles() -> None:
    assert {action.split(":")[0] for action in actions(read_policy("storage"))} == {"s3"}
    assert "ec2:RunInstances" in actions(read_policy("launch"))
    (pass_role,) = [s for s in read_policy("launch") if s["Action"] == "iam:PassRole"]
    assert pass_role["Resource"] == "arn:aws:iam::*:role/catsdogs-worker"


def test_input_is_read_only_and_only_a_prefix_of_the_output_is_writable() -> None:
    list_statement, read_statement, write_statement = read_policy("storage")
    assert actions([list_statement]) == {"s3:ListBucket"}
    assert actions([read_statement]) == {"s3:GetObject"}
    assert actions([write_statement]) == {
        "s3:GetObject",
        "s3:PutObject",
        "s3:AbortMultipartUpload",
        "s3:DeleteObject",
    }
    assert re.fullmatch(r"arn:aws:s3:::[^*/]+/[^*]+/\*", write_statement["Resource"])
    assert not fnmatchcase(read_statement["Resource"], write_statement["Resource"])


def test_the_policy_of_the_head_grants_exactly_the_calls_of_the_autoscaler(cluster: Cluster) -> None:
    granted = {action for action in actions(read_policy("launch")) if action.startswith("ec2:")}
    assert {f"ec2:{operation}" for operation in cluster.head_operations} == granted


def is_allowed(launch: Config) -> bool:
    """Evaluate the conditions of cluster/launch.json for a RunInstances request."""
    keys = {f"aws:RequestTag/{key}": value for key, value in read_tags(launch).items()}
    keys["ec2:MetadataHttpTokens"] = launch["MetadataOptions"]["HttpTokens"]
    keys["ec2:InstanceType"] = launch["InstanceType"]
    keys["ec2:InstanceProfile"] = f"arn:aws:iam::1:instance-profile/{launch['IamInstanceProfile']['Name']}"
    (statement,) = [s for s in read_policy("launch") if s["Sid"] == "LaunchWorkersOnly"]
    conditions = [item for operator in statement["Condition"].values() for item in operator.items()]
    return all(any(fnmatchcase(keys[key], pattern) for pattern in as_list(value)) for key, value in conditions)


@pytest.mark.parametrize(("node_type", "allowed"), [("head", False), ("gpu", True), ("gpu_spot", True)])
def test_the_head_can_launch_workers_but_no_second_head(cluster: Cluster, node_type: str, allowed: bool) -> None:
    assert is_allowed(cluster.find_launch(node_type)) is allowed
