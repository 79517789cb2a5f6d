"""Print the table of all replaced names, in Markdown: ``python -m qwen_cl.patches``."""

from qwen_cl.patches.registry import package_of, patches


def table() -> str:
    lines = ["| replaced name | written for | replaced in | why |", "|---|---|---|---|"]
    for patch in patches().values():
        package, versions = package_of(patch)
        name, why = patch.name.replace(":", "."), f"on a CPU: {patch.why}" if patch.cpu else patch.why
        lines.append(f"| `{name}` | {package}{versions} | `{patch.by}` | {why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
