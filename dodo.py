"""The tasks. `doit list` shows them; parameters are `recipe=NAME driver=VERSION`."""

from katagpu import locktasks, releasetasks, tasks, testtasks

DOIT_CONFIG = tasks.config()
task_stages = tasks.stage_tasks
task_setup = tasks.setup
task_host = tasks.host
task_lock = locktasks.lock
task_fetch = locktasks.fetch
task_why = tasks.why
task_diff = tasks.diff
task_cache = tasks.cache
task_test = testtasks.test
task_boot_check = tasks.boot_check
task_boot_shell = tasks.boot_shell
task_bench = tasks.bench
task_reproduce = releasetasks.reproduce
task_release = releasetasks.release
task_publish = releasetasks.publish
task_install = releasetasks.install
task_uninstall = releasetasks.uninstall


def task_build_kernel() -> tasks.Task:
    return tasks.build("build_kernel", "the guest kernel: vmlinuz, vmlinux, config, System.map")


def task_build_headers() -> tasks.Task:
    return tasks.build("build_headers", "the kernel's linux-headers package")


def task_build_rootfs() -> tasks.Task:
    return tasks.build("build_rootfs", "the guest's root file system, merged and checked")


def task_install_driver() -> tasks.Task:
    return tasks.build("install_driver", "NVIDIA kernel modules and user space, as layers")


def task_install_toolkit() -> tasks.Task:
    return tasks.build("install_toolkit", "the NVIDIA Container Toolkit, as a layer")


def task_build_initrd() -> tasks.Task:
    return tasks.build("build_initrd", "the guest as an initrd, whatever the recipe's own format")


def task_build_image() -> tasks.Task:
    return tasks.build("build_image", "everything: kernel, headers, image, Kata drop-in, manifest")


def task_lint() -> tasks.Task:
    return tasks.program("ruff check", "mypy", doc="ruff and mypy, strict as pyproject.toml says")


def task_fmt() -> tasks.Task:
    return tasks.program("ruff check --fix-only", doc="let ruff mend what it can")
