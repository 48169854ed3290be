# SPDX-License-Identifier: LGPL-2.1-or-later
#
# bash completion for virtlockctl

_virtlockctl() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} command= word i
    local -A options=(
        [list]="--lockspace --resource --owner --mode --unsafe --output"
        [who]="--output"
        [events]="--follow --kind --after --output"
        [check]="--quiet --output"
        [status]="--output"
        [release]="--lockspace --pid --yes --output"
        [resume]="--output"
        [top]="--interval"
        [metrics]="--file"
        [exporter]="--listen"
        [completion]=""
        [version]=""
        [help]=""
    )
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word != -* && ${COMP_WORDS[i-1]} != -c && ${COMP_WORDS[i-1]} != --socket ]]; then
            command=$word
            break
        fi
    done
    COMPREPLY=()
    case $command:$previous in
        *:-c | *:--socket | metrics:-f | metrics:--file) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$current"); return ;;
        *:-o | *:--output) mapfile -t COMPREPLY < <(compgen -W "text json" -- "$current"); return ;;
        list:-m | list:--mode) mapfile -t COMPREPLY < <(compgen -W "exclusive shared" -- "$current"); return ;;
        events:-k | events:--kind) mapfile -t COMPREPLY < <(compgen -W "acquired released refused killed upgraded recovered lost faulty" -- "$current"); return ;;
    esac
    if [[ -z $command ]]; then
        mapfile -t COMPREPLY < <(compgen -W "${!options[*]} --socket --help --version" -- "$current")
    elif [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "${options[$command]} --socket --help" -- "$current")
    else
        case $command in
            who) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
            completion) mapfile -t COMPREPLY < <(compgen -W "bash zsh fish" -- "$current") ;;
            help) mapfile -t COMPREPLY < <(compgen -W "${!options[*]}" -- "$current") ;;
        esac
    fi
}
complete -F _virtlockctl virtlockctl
