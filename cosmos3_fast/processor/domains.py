"""Embodiment domains: id (which per-domain weights) and raw action width (docs/model.md, 4)."""

from __future__ import annotations

from cosmos3_fast.numeric import is_integer

# name -> (id, widths that need no leave to be used; the first is the default, none: say one)
DOMAINS: dict[str, tuple[int, tuple[int, ...]]] = {
    "no_action": (0, ()),
    "av": (1, (9,)),
    "camera_pose": (2, (9,)),
    "hand_pose": (3, (57,)),
    "pusht": (4, (2,)),
    "libero": (5, ()),
    "umi": (6, (10,)),
    "bridge_orig_lerobot": (7, (10,)),
    "droid_lerobot": (8, (10, 8)),  # 8: seven joints and the gripper
    "robomind-franka": (8, (10,)),
    "galbot": (9, (30,)),
    "robomind-franka-dual": (12, (20,)),
    "robomind-ur": (13, (10,)),
    "agibotworld": (15, (29,)),
    "agibot_gear_gripper": (15, (29,)),
    "agibot_gear_gripper_ext": (15, (29,)),
    "fractal": (20, (10,)),
}


def resolve_domain_id(domain: str | int) -> int:
    """Id of a domain name; integers >= 0, also as decimal text, stand for themselves.

    ValueError for anything else.
    """
    if isinstance(domain, str):
        if domain in DOMAINS:
            return DOMAINS[domain][0]
        if domain.isascii() and domain.isdecimal():
            return int(domain)
    elif is_integer(domain):
        if domain < 0:
            raise ValueError(f"domain id must be >= 0, got {domain}")
        return int(domain)
    raise ValueError(f"unknown domain {domain!r}; expected one of {sorted(DOMAINS)} or an id >= 0")


def resolve_raw_action_dim(
    domain: str | int, raw_action_dim: int | None = None, *, allow_width: bool = False
) -> int:
    """Width of an action row: the explicit one, else the table's.

    An explicit width that the table does not list for this domain raises; `allow_width=True` takes
    it all the same. Ids and domains without a fixed width need an explicit one, and take any.
    """
    domain_id = resolve_domain_id(domain)
    widths = DOMAINS[domain][1] if isinstance(domain, str) and domain in DOMAINS else ()
    if raw_action_dim is None:
        if not widths:
            raise ValueError(f"domain {domain!r} has no fixed action width: give raw_action_dim")
        return widths[0]
    if not is_integer(raw_action_dim) or raw_action_dim < 1:
        raise ValueError(
            f"raw_action_dim must be a positive integer, got {raw_action_dim!r} "
            f"({type(raw_action_dim).__name__})"
        )
    if widths and raw_action_dim not in widths and not allow_width:
        raise ValueError(
            f"raw_action_dim {raw_action_dim} differs from {list(widths)}, the width of domain "
            f"{domain!r}; if it is meant, give the domain as its id, {domain_id}"
        )
    return int(raw_action_dim)
