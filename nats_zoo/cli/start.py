"""Commands to begin with: recipes, and the whole path on a drawn data set."""

from .command import Command
from .recipes import FOLDER, copy_recipe, read_recipe, recipe_head, recipe_names, recipe_title


def recipes(names: tuple[str, ...] = (), output: str = FOLDER) -> None:
    """List the recipes that come with the package, or copy some into a folder and print what stands at their heads.

    Args:
        names: recipes to copy; without any all are listed.
        output: folder to copy to.
    """
    if not names:
        found = recipe_names()
        width = max(map(len, found))
        print(*(f"{name:<{width}}  {recipe_title(read_recipe(name))}" for name in found), sep="\n")
        print("\nnats recipes NAME copies one to recipes/NAME.yaml and shows the commands that it is for.")
    for name in names:
        print(f"{copy_recipe(name, output)}\n\n{recipe_head(read_recipe(name))}\n")


COMMANDS = {
    "recipes": Command(
        "YAML files for --config: the paper's rows and others, ready to run", "cli.start:recipes", words=("names",)
    ),
    "demo": Command("the whole path on a drawn data set, without a download", "search.demo:run_demo"),
}
