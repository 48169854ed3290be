# SPDX-License-Identifier: LGPL-2.1-or-later
#
# fish completion for virtlockctl

complete -c virtlockctl -f
complete -c virtlockctl -s c -l socket -r -F -d 'admin socket of the daemon'
complete -c virtlockctl -s h -l help -d 'show the options'
complete -c virtlockctl -n __fish_use_subcommand -s V -l version -d 'show the version'

complete -c virtlockctl -n __fish_use_subcommand -a list -d 'show the locks that are held'
complete -c virtlockctl -n __fish_use_subcommand -a who -d 'show who holds a disk'
complete -c virtlockctl -n __fish_use_subcommand -a events -d 'show what has happened to locks'
complete -c virtlockctl -n __fish_use_subcommand -a check -d 'see whether each lock is what it should be'
complete -c virtlockctl -n __fish_use_subcommand -a status -d 'show how the daemon is'
complete -c virtlockctl -n __fish_use_subcommand -a release -d 'take a lock from its owner'
complete -c virtlockctl -n __fish_use_subcommand -a resume -d 'continue a guest that was stopped because a lock was lost'
complete -c virtlockctl -n __fish_use_subcommand -a top -d 'show what happens, live'
complete -c virtlockctl -n __fish_use_subcommand -a metrics -d 'print metrics for Prometheus'
complete -c virtlockctl -n __fish_use_subcommand -a exporter -d 'serve metrics to Prometheus'
complete -c virtlockctl -n __fish_use_subcommand -a completion -d 'print a completion script'
complete -c virtlockctl -n __fish_use_subcommand -a version -d 'show the version of the tool'
complete -c virtlockctl -n __fish_use_subcommand -a help -d 'show the commands, or the options of one'

complete -c virtlockctl -n '__fish_seen_subcommand_from list who events check status release resume' -s o -l output -x -a 'text json' -d 'how to print'
complete -c virtlockctl -n '__fish_seen_subcommand_from list' -s l -l lockspace -r -F -d 'only in this lockspace'
complete -c virtlockctl -n '__fish_seen_subcommand_from list' -s r -l resource -x -d 'only those that contain this'
complete -c virtlockctl -n '__fish_seen_subcommand_from list' -s u -l owner -x -d 'only of this domain'
complete -c virtlockctl -n '__fish_seen_subcommand_from list' -s m -l mode -x -a 'exclusive shared' -d 'only of this mode'
complete -c virtlockctl -n '__fish_seen_subcommand_from list' -l unsafe -d 'only those that are not crash-safe'
complete -c virtlockctl -n '__fish_seen_subcommand_from who' -F
complete -c virtlockctl -n '__fish_seen_subcommand_from events' -s f -l follow -d 'go on until interrupted'
complete -c virtlockctl -n '__fish_seen_subcommand_from events' -s k -l kind -x -a 'acquired released refused killed upgraded recovered lost faulty' -d 'only of this kind'
complete -c virtlockctl -n '__fish_seen_subcommand_from events' -l after -x -d 'only with a greater number'
complete -c virtlockctl -n '__fish_seen_subcommand_from check' -s q -l quiet -d 'say nothing'
complete -c virtlockctl -n '__fish_seen_subcommand_from release' -s l -l lockspace -r -F -d 'directory of the lockspace'
complete -c virtlockctl -n '__fish_seen_subcommand_from release' -s p -l pid -x -d 'process id of the owner'
complete -c virtlockctl -n '__fish_seen_subcommand_from release' -s y -l yes -d 'do not ask'
complete -c virtlockctl -n '__fish_seen_subcommand_from top' -s i -l interval -x -d 'how often to look'
complete -c virtlockctl -n '__fish_seen_subcommand_from metrics' -s f -l file -r -F -d 'write them to this file'
complete -c virtlockctl -n '__fish_seen_subcommand_from exporter' -s l -l listen -x -d 'where to serve'
complete -c virtlockctl -n '__fish_seen_subcommand_from completion' -a 'bash zsh fish'
complete -c virtlockctl -n '__fish_seen_subcommand_from help' -a 'list who events check status release resume top metrics exporter completion version'
