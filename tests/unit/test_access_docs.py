"""The table of roles in the docs is the one in the code."""

from pathlib import Path

from nos.wire.v1 import access_pb2
from nos_backend.rpc.access import LEAST_ROLE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "access.md"
ROLES = ("none", "viewer", "user", "author", "admin")


def test_documented_roles_are_those_of_the_code():
    table = PAGE.read_text().partition("| call |")[2].splitlines()[2:]
    documented = {}
    for line in table:
        call, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        documented[call.strip("`")] = [cell == "x" for cell in cells]
    wanted = {}
    for method, least in LEAST_ROLE.items():
        service, name = method.strip("/").split("/")
        roles = range(len(ROLES))
        admitted = [least is None or (role > 0 and role >= least) for role in roles]
        wanted[f"{service.rpartition('.')[2]}.{name}"] = admitted
    assert documented == wanted
    assert [access_pb2.Role.Name(role) for role in range(1, 5)] == [
        f"ROLE_{name.upper()}" for name in ROLES[1:]
    ]
