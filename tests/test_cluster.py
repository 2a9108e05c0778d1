"""`ray up cluster.yaml` with Ray's own launcher, up to its requests to EC2; moto answers them."""

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
import ray
import yaml
from moto import mock_aws
from ray.autoscaler._private import commands, providers
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import utils as aws_clients
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter

REPO = Path(__file__).parents[1]
WRITTEN = (REPO / "cluster.yaml").read_text()  # may have been edited as the README says
REGION = yaml.safe_load(WRITTEN)["provider"]["region"]
SSH = json.loads((REPO / "cluster" / "ssh.json").read_text())
NODE_TYPES = ["head", "gpu", "gpu_spot"]

# Ray leaves two files open: the config it reads, and the one it writes for the head.
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
    """What Ray resolved and sent: `requests` holds operation and parameters in order."""

    security_group: str
    config: Config = field(default_factory=dict)
    requests: list[tuple[str, Config]] = field(default_factory=list)
    updaters: list[Config] = field(default_factory=list)
    as_head: Config = field(default_factory=dict)
    asked_by_head: set[str] = field(default_factory=set)
    profiles: dict[str, str] = field(default_factory=dict)

    def launch_of(self, node_type: str) -> Config:
        """Return the RunInstances parameters of the one launch of this node type."""
        (launch,) = [
            parameters
            for operation, parameters in self.requests
            if operation == "RunInstances" and tags_of(parameters)["ray-user-node-type"] == node_type
        ]
        return launch


def tags_of(launch: Config) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in launch["TagSpecifications"][0]["Tags"]}


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """An empty AWS account in this process, and a home directory with a token."""
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
        forget_clients()
        with mock_aws():
            make_roles()
            yield patch
        forget_clients()


def forget_clients() -> None:
    aws_clients.resource_cache.cache_clear()
    aws_clients.client_cache.cache_clear()
    aws_config._get_subnets_or_die.cache_clear()
    providers._clear_provider_cache()


def ssh_networks() -> list[str]:
    return [ip_range["CidrIp"] for rule in SSH for ip_range in rule["IpRanges"]]


def make_roles() -> None:
    """Do what the README does with the AWS command line."""
    iam = boto3.client("iam", REGION)
    for role in ("catsdogs-head", "catsdogs-worker"):
        trust = (REPO / "cluster" / "trust.json").read_text()
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=trust)
        for policy in ["storage", "launch"] if role == "catsdogs-head" else ["storage"]:
            document = (REPO / "cluster" / f"{policy}.json").read_text()
            iam.put_role_policy(RoleName=role, PolicyName=policy, PolicyDocument=document)
        iam.create_instance_profile(InstanceProfileName=role)
        iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)


def make_security_group() -> str:
    ec2 = boto3.client("ec2", REGION)
    group = ec2.create_security_group(GroupName="catsdogs", Description="catsdogs Ray cluster")["GroupId"]
    among_nodes = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[*SSH, among_nodes])
    return group


def bootstrap(config: Config) -> Config:
    """Resolve a config against the account, the part of `ray up` before the first launch."""
    forget_clients()
    return aws_config.bootstrap_aws(commands.prepare_config(config))


def ray_up(path: Path) -> Config:
    """`ray up --yes --no-config-cache`."""
    return commands.create_or_update_cluster(
        str(path), None, None, no_restart=False, restart_only=False, yes=True, no_config_cache=True
    )


def launch_as_head(cluster: Cluster, node_type: str) -> None:
    """Launch one worker the way the head's autoscaler does, from the config that `ray up` sends it."""
    autoscaling = AutoscalingConfig(cluster.as_head, skip_content_hash=True)

    class Reader:
        def get_cached_autoscaling_config(self) -> AutoscalingConfig:
            return autoscaling

    provider = providers._get_node_provider(cluster.as_head["provider"], cluster.as_head["cluster_name"])
    adapter = NodeProviderAdapter(provider, Reader())
    adapter._launch_nodes_by_type(node_type, 1, "request")
    assert adapter.poll_errors() == []


def profiles_by_node_type() -> dict[str, str]:
    """Read back from EC2, over a session that is not recorded, who has which instance profile."""
    reservations = boto3.Session().client("ec2", REGION).describe_instances()["Reservations"]
    instances = [instance for reservation in reservations for instance in reservation["Instances"]]
    return {
        tag["Value"]: instance["IamInstanceProfile"]["Arn"]
        for instance in instances
        for tag in instance["Tags"]
        if tag["Key"] == "ray-user-node-type"
    }


def scale_as_head(cluster: Cluster) -> None:
    """Add a worker of each type, mark one as ready, and end them."""
    asked_by_client = len(cluster.requests)
    for node_type in ("gpu", "gpu_spot"):
        launch_as_head(cluster, node_type)
    cluster.profiles = profiles_by_node_type()
    provider = providers._get_node_provider(cluster.as_head["provider"], cluster.as_head["cluster_name"])
    workers = provider.non_terminated_nodes({"ray-node-type": "worker"})
    provider.set_node_tags(workers[0], {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(workers)
    cluster.asked_by_head = {operation for operation, _ in cluster.requests[asked_by_client:]}


def no_ssh(cluster: Cluster) -> type:
    """A stand-in for Ray's installer of a node, which keeps what it was asked to do."""

    class NoSSH:
        exitcode = 0

        def __init__(self, **asked: Any) -> None:
            cluster.updaters.append(asked)
            cluster.as_head = json.loads(Path(asked["file_mounts"]["~/ray_bootstrap_config.yaml"]).read_text())

        def start(self) -> None: ...

        def join(self) -> None: ...

    return NoSSH


@pytest.fixture(scope="module")
def cluster(aws: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster up, then one worker of each type come and gone."""
    cluster = Cluster(make_security_group())

    def keep(params: Config, model: Any, **_: Any) -> None:
        cluster.requests.append((model.name, copy.deepcopy(params)))

    forget_clients()
    boto3.setup_default_session()
    boto3.DEFAULT_SESSION.events.register("provide-client-params.ec2", keep)
    aws.setattr(commands, "NodeUpdaterThread", no_ssh(cluster))
    aws.setattr("ray.autoscaler._private.aws.node_provider.TAG_BATCH_DELAY", 0)
    path = tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    (unknown_group,) = yaml.safe_load(WRITTEN)["metadata"]["security_groups"]
    path.write_text(WRITTEN.replace(unknown_group, cluster.security_group))
    cluster.config = ray_up(path)
    home = Path(os.environ["HOME"])
    shutil.copy(home / ".ssh" / "catsdogs.pem", home / "ray_bootstrap_key.pem")
    scale_as_head(cluster)
    gc.collect()  # or the second of the open files would warn in some later test
    return cluster


@pytest.mark.parametrize("node_type", NODE_TYPES)
def test_every_node_demands_imdsv2_one_hop_away(cluster: Cluster, node_type: str) -> None:
    options = cluster.launch_of(node_type)["MetadataOptions"]
    assert (options["HttpTokens"], options["HttpPutResponseHopLimit"]) == ("required", 1)


@pytest.mark.parametrize("node_type", NODE_TYPES)
def test_every_disk_is_encrypted(cluster: Cluster, node_type: str) -> None:
    (disk,) = cluster.launch_of(node_type)["BlockDeviceMappings"]
    assert disk["Ebs"]["Encrypted"] is True
    assert disk["Ebs"]["VolumeType"] == "gp3"


@pytest.mark.parametrize(
    ("node_type", "profile"),
    [("head", "catsdogs-head"), ("gpu", "catsdogs-worker"), ("gpu_spot", "catsdogs-worker")],
)
def test_head_and_workers_have_different_roles(cluster: Cluster, node_type: str, profile: str) -> None:
    assert cluster.launch_of(node_type)["IamInstanceProfile"] == {"Name": profile}
    assert cluster.profiles[node_type].endswith(f":instance-profile/{profile}")


@pytest.mark.parametrize("node_type", NODE_TYPES)
def test_every_node_is_in_our_security_group_with_our_key(cluster: Cluster, node_type: str) -> None:
    launch = cluster.launch_of(node_type)
    assert launch["SecurityGroupIds"] == [cluster.security_group]
    assert launch["KeyName"] == "catsdogs"


def test_the_private_key_is_for_its_owner_only(cluster: Cluster) -> None:
    key = Path(cluster.config["auth"]["ssh_private_key"])
    assert key == Path(os.environ["HOME"]) / ".ssh" / "catsdogs.pem"
    assert key.stat().st_mode & 0o777 == 0o600


def test_nothing_from_outside_but_ssh_from_one_network(cluster: Cluster) -> None:
    group = boto3.resource("ec2", REGION).SecurityGroup(cluster.security_group)
    from_outside = [
        (rule["IpProtocol"], rule["FromPort"], rule["ToPort"], ip_range["CidrIp"])
        for rule in group.ip_permissions
        for ip_range in rule["IpRanges"] + rule.get("Ipv6Ranges", [])
    ]
    assert from_outside == [("tcp", 22, 22, cidr) for cidr in ssh_networks()]
    assert "0.0.0.0/0" not in ssh_networks()
    assert not {"CreateSecurityGroup", "AuthorizeSecurityGroupIngress"} & {o for o, _ in cluster.requests}


def test_ray_refuses_the_security_group_that_was_not_edited(
    aws: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        bootstrap(yaml.safe_load(WRITTEN))
    assert "Failed to detect a security group" in "".join(capsys.readouterr())


def test_a_security_group_made_by_ray_would_be_open(aws: pytest.MonkeyPatch) -> None:
    """The reason for a group of our own: Ray adds its rule to the ones it is given."""
    config = yaml.safe_load(WRITTEN)
    for node_type in config["available_node_types"].values():
        node_type["node_config"].pop("SecurityGroupIds", None)  # two types share one dict
    config["provider"]["security_group"] = {"GroupName": "made-by-ray", "IpPermissions": SSH}
    (group,) = bootstrap(config)["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    rules = boto3.resource("ec2", REGION).SecurityGroup(group).ip_permissions
    assert {"0.0.0.0/0", *ssh_networks()} == {r["CidrIp"] for rule in rules for r in rule["IpRanges"]}


def test_only_the_spot_type_is_spot(cluster: Cluster) -> None:
    market = {node_type: cluster.launch_of(node_type).get("InstanceMarketOptions") for node_type in NODE_TYPES}
    assert market == {"head": None, "gpu": None, "gpu_spot": {"MarketType": "spot"}}


def test_workers_bring_gpus_and_the_head_takes_no_tasks(cluster: Cluster) -> None:
    resources = {name: t["resources"] for name, t in cluster.config["available_node_types"].items()}
    assert resources["head"] == {"CPU": 0}
    for worker in ("gpu", "gpu_spot"):
        assert resources[worker]["GPU"] >= 1
        assert resources[worker]["CPU"] >= 1


def test_workers_come_on_demand_and_one_market_is_off(cluster: Cluster) -> None:
    types = cluster.config["available_node_types"]
    assert [types[name]["min_workers"] for name in NODE_TYPES] == [0, 0, 0]
    most = [types[name]["max_workers"] for name in ("gpu", "gpu_spot")]
    assert sorted(most) == [0, cluster.config["max_workers"]]


def test_images_carry_rays_version_and_one_python(cluster: Cluster) -> None:
    autoscaling = AutoscalingConfig(cluster.as_head, skip_content_hash=True)
    images = {name: autoscaling.get_docker_config(name)["image"] for name in NODE_TYPES}
    tag = re.escape(f"rayproject/ray:{ray.__version__}-") + r"py3(\d+)-(cpu|gpu)"
    found = {name: re.fullmatch(tag, image) for name, image in images.items()}
    assert {name: match and match[2] for name, match in found.items()} == {
        "head": "cpu",
        "gpu": "gpu",
        "gpu_spot": "gpu",
    }
    (minor,) = {int(match[1]) for match in found.values() if match}
    assert minor >= 11
    assert f"ray=={ray.__version__}\n" in (REPO / "requirements.lock").read_text()
    assert cluster.updaters[0]["docker_config"]["head_image"] == images["head"]


def test_the_dashboard_listens_on_loopback_only(cluster: Cluster) -> None:
    (start,) = [c for c in cluster.updaters[0]["ray_start_commands"] if "ray start" in c]
    assert re.findall(r"--dashboard-host[= ](\S+)", start) == ["127.0.0.1"]


@pytest.mark.parametrize("where", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_starts_with_token_authentication(cluster: Cluster, where: str) -> None:
    (start,) = [command for command in cluster.as_head[where] if "ray start" in command]
    assert start.index("export RAY_AUTH_MODE=token;") < start.index("ray start")


def test_the_token_travels_where_ray_looks_for_it(cluster: Cluster) -> None:
    asked = cluster.updaters[0]
    assert asked["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in asked["setup_commands"]
    assert "chmod 600 ~/.ray/auth_token" in cluster.as_head["worker_setup_commands"]
    assert cluster.as_head["file_mounts"]["/home/ray/.ray/auth_token"] == "/home/ray/.ray/auth_token"
    assert "0" * 64 not in json.dumps(cluster.as_head)


def test_nodes_install_the_lock_file(cluster: Cluster) -> None:
    mount = "/home/ray/catsdogs/requirements.lock"
    assert (REPO / cluster.updaters[0]["file_mounts"][mount]).is_file()
    for setup in (cluster.updaters[0]["setup_commands"], cluster.as_head["worker_setup_commands"]):
        assert any(c.startswith("pip install") and "-r ~/catsdogs/requirements.lock" in c for c in setup)


def test_no_policy_grants_everything() -> None:
    texts = [path.read_text() for path in [REPO / "cluster.yaml", *(REPO / "cluster").glob("*.json")]]
    assert not any("FullAccess" in text for text in texts)
    statements = read_policy("storage") + read_policy("launch")
    assert not [action for action in actions(statements) if "*" in action]
    anywhere = [s for s in statements if "*" in as_list(s["Resource"])]
    assert actions(anywhere) == {"ec2:DescribeInstances"}


def test_only_the_heads_own_policy_touches_machines_and_roles() -> None:
    assert {action.split(":")[0] for action in actions(read_policy("storage"))} == {"s3"}
    assert "ec2:RunInstances" in actions(read_policy("launch"))
    (passing,) = [s for s in read_policy("launch") if s["Action"] == "iam:PassRole"]
    assert passing["Resource"] == "arn:aws:iam::*:role/catsdogs-worker"


def test_input_is_read_only_and_only_a_prefix_of_output_is_written() -> None:
    may_list, may_read, may_write = read_policy("storage")
    assert actions([may_list]) == {"s3:ListBucket"}
    assert actions([may_read]) == {"s3:GetObject"}
    assert actions([may_write]) == {
        "s3:GetObject",
        "s3:PutObject",
        "s3:AbortMultipartUpload",
        "s3:DeleteObject",
    }
    assert re.fullmatch(r"arn:aws:s3:::[^*/]+/[^*]+/\*", may_write["Resource"])
    assert not fnmatchcase(may_read["Resource"], may_write["Resource"])


def test_the_heads_policy_has_what_the_autoscaler_calls_and_no_more(cluster: Cluster) -> None:
    granted = {action for action in actions(read_policy("launch")) if action.startswith("ec2:")}
    assert {f"ec2:{operation}" for operation in cluster.asked_by_head} == granted


def may_launch(launch: Config) -> bool:
    """Judge a RunInstances request by the conditions of cluster/launch.json."""
    keys = {f"aws:RequestTag/{key}": value for key, value in tags_of(launch).items()}
    keys["ec2:MetadataHttpTokens"] = launch["MetadataOptions"]["HttpTokens"]
    keys["ec2:InstanceType"] = launch["InstanceType"]
    keys["ec2:InstanceProfile"] = f"arn:aws:iam::1:instance-profile/{launch['IamInstanceProfile']['Name']}"
    (statement,) = [s for s in read_policy("launch") if s["Sid"] == "LaunchWorkersOnly"]
    wanted = [item for operator in statement["Condition"].values() for item in operator.items()]
    return all(any(fnmatchcase(keys[key], pattern) for pattern in as_list(value)) for key, value in wanted)


@pytest.mark.parametrize(("node_type", "allowed"), [("head", False), ("gpu", True), ("gpu_spot", True)])
def test_the_head_may_launch_workers_and_no_second_head(cluster: Cluster, node_type: str, allowed: bool) -> None:
    assert may_launch(cluster.launch_of(node_type)) is allowed
