"""The English counterpart of each Japanese template; loaded only for ``GPU_RESOURCE_LANG=en``.

In the order of the sources: the library, the command line, the other extensions.
"""

from __future__ import annotations

ENGLISH: dict[str, str] = {
    # The library: errors
    "{parameter} {problem}: {value!r}\n  対処: {remedy}": "{parameter} {problem}: {value!r}\n  What to do: {remedy}",
    "タスクID {value!r} {problem}\n  対処: {remedy}": "Task ID {value!r} {problem}\n  What to do: {remedy}",
    (
        "タスク {task_id!r} は {owner} のものです\n  対処: 本人に確認し、それでも解放するなら --force を付けてください"
    ): "Task {task_id!r} belongs to {owner}\n  What to do: ask them; to release it all the same, add --force",
    (
        "タスク {task_id!r} のプロセスが動いています: {who}\n"
        "  対処: 終わるのを待つか、--stop {name} で終了させてください"
        " (--release {name} --force は記録だけを消します。GPU は使われたまま、他のタスクに渡ります)"
    ): (
        "Processes of task {task_id!r} are running: {who}\n"
        "  What to do: wait until they have ended, or end them with --stop {name}"
        " (--release {name} --force removes the record only: they go on using GPUs that others are then given)"
    ),
    (
        "既存の状態ファイルの構成は指定と異なります: {resource_file}\n"
        "  対処: 変えるなら、--init の代わりに --reset で同じ構成を指定してください"
    ): (
        "The pool that exists has other servers than those described: {resource_file}\n"
        "  What to do: to change it, give the same description with --reset instead of --init"
    ),
    "終わるのを待つか、記録を消してよければ --reset --yes を指定してください": (
        "wait until they have ended, or use --reset --yes if their records may go"
    ),
    "--stop TASK_ID で終了させるか、記録を消してよければ --reset --yes --force を指定してください": (
        "end them with --stop TASK_ID, or use --reset --yes --force if their records may go"
    ),
    "実行中のタスクがあります: {}\n  対処: {}": "There are running tasks: {}\n  What to do: {}",
    "GPU {required_gpus} 個と CPU {required_cpus} 個を同時に確保できるサーバーがありません": (
        "no server has {required_gpus} GPUs and {required_cpus} CPUs free at once"
    ),
    "タスク {0} の中で動いているため、{0} が終わるまで空きません: ": (
        "we run inside task {0}, so nothing comes free before {0} has ended: "
    ),
    "・": ", ",
    "{} {} 個": "{1} {0}",
    "{}不足": "lacks {}",
    "先に待っている要求のために確保中": "reserved for requests that came earlier",
    "対象外": "too small for it, or not asked for",
    " (使用停止中: GPU {})": " (out of service: GPU {})",
    "    {}: GPU {} 個・CPU {} 個 ({} から{})": "    {}: {} GPUs, {} CPUs (since {}{})",
    "  空きの合計 (GPU {} 個・CPU {} 個) は足りますが、複数のサーバーに分散しています": (
        "  what is free ({} GPUs, {} CPUs) would be enough, but it is scattered over several servers"
    ),
    "  次の {} 件が解放されれば足ります: {}": "  the release of these {} would be enough: {}",
    "  先に待っている要求: {} 件": "  requests that wait ahead: {}",
    "タスク {task_id!r} の待機は取り消されました": "The wait of task {task_id!r} was cancelled",
    (
        "ロック取得タイムアウト\n  {lock_file} と {directory} のロックを {timeout_s:g} 秒待ちましたが、"
        "別のプロセスが使用中です\n  対処: しばらくして再実行するか、lslocks で保持しているプロセスを確認してください"
        " (ロックファイルの削除は不要です)"
    ): (
        "Timeout of the lock\n  we waited for the locks of {lock_file} and {directory} for {timeout_s:g} seconds,"
        " but another process holds them\n  What to do: try again later, or find the process with lslocks"
        " (there is no need to delete the lock file)"
    ),
    "状態ファイルのエラー: {path}\n  原因: {reason}\n  対処: {remedy}": (
        "Error of the state file: {path}\n  Reason: {reason}\n  What to do: {remedy}"
    ),
    "プールがありません: {path}\n  原因: {reason}\n  対処: {remedy}": (
        "There is no pool: {path}\n  Reason: {reason}\n  What to do: {remedy}"
    ),
    (
        "必要なパッケージを読み込めません: {reason}\n"
        "  対処: filelock 3.30 以降を、この Python ({python}) に pip でインストールしてください"
    ): "A package is missing: {reason}\n  What to do: pip install filelock 3.30 or later into this Python ({python})",
    (
        "架空のサーバーから割り当てました: %s"
        " (実際の計算機は --reset --detect か --reset --server NAME:GPUS:CPUS で登録してください)"
    ): (
        "granted from made-up servers: %s"
        " (describe the real ones with --reset --detect or --reset --server NAME:GPUS:CPUS)"
    ),
    "タスク %s の GPU %s は、記録では他のタスクのものです。どちらかを終了させてください": (
        "by the record, GPUs of task %s are another task's: %s; end one of them"
    ),
    "タスクが見つかりません: %s": "There is no such task: %s",
    "がファイルのパスではありません": "is no path of a file",
    "パスを文字列で指定してください": "give the path as a text",
    "が絶対パスではありません": "is no absolute path",
    "/ で始まる状態ファイルのパスか、postgresql:// か redis:// の場所を指定してください": (
        "give the path of the state file, which begins with /, or a postgresql:// or redis:// place"
    ),
    "の言語はありません": "is no language that we speak",
    "ja か en を指定するか、指定をやめてください": "use ja or en, or leave it unset",
    "が秒数ではありません": "is no number of seconds",
    "0 以上 10 億以下の数か math.inf を指定してください": "give a number from 0 to 1e9, or math.inf",
    "が正しくありません": "is not right",
    "{least}-{most} の整数を指定してください": "give a whole number from {least} to {most}",
    "制御文字を含まず - で始まらない 1-{most} 文字の文字列を指定してください": (
        "give a text of 1-{most} characters without control characters that does not begin with -"
    ),
    "は既に実行中または待機中です": "runs or waits already",
    "別のタスクIDを使うか、先に解放してください": "use another task ID, or release that one first",
    "が空か、同じ名前が重複しています": "is empty, or has a name twice",
    "異なる名前を指定してください": "give different names",
    "のサーバーはありません": "is no server of this pool",
    "{known} のいずれかを指定してください": "use one of {known}",
    "の両方を備えたサーバーがありません": "is more than any one server has",
    "--status で各サーバーの合計を確認し、1 台に収まる数を指定してください": (
        "see the totals of each server with --status, and ask for what one of them has"
    ),
    "が正しくありません。{why} (登録済み: {known})": "is not right: {why} (known: {known})",
    "GPU_RESOURCE_SERVER でサーバー名を指定するか、--add-server NAME:GPUS:CPUS でこの計算機を登録してください": (
        "name the server in GPU_RESOURCE_SERVER, or add this machine with --add-server NAME:GPUS:CPUS"
    ),
    "この計算機 ({}) にあたるサーバーがありません": "no server is this machine ({})",
    "この計算機はサーバー {} です": "this machine is the server {}",
    "この計算機にあたるサーバーが複数あります": "several servers are this machine",
    "は使えません。この計算機は既にサーバー {name} として使われています": (
        "cannot be used: this machine is in use as the server {name} already"
    ),
    "GPU_RESOURCE_SERVER に {name} を指定してください": "set GPU_RESOURCE_SERVER to {name}",
    "内容を直すか、--reset --yes で作り直してください (元のファイルは保存されます)": (
        "mend the content, or make it anew with --reset --yes (the file of now is kept aside)"
    ),
    (
        "GPU_RESOURCE_FILE と /etc/gpu-resource-file が正しいか確認し、新しく作るなら "
        "--init --detect か --init --server NAME:GPUS:CPUS を実行してください"
    ): (
        "check GPU_RESOURCE_FILE and /etc/gpu-resource-file; to make a new pool, use "
        "--init --detect or --init --server NAME:GPUS:CPUS"
    ),
    "GPU_RESOURCE_FILE と /etc/gpu-resource-file が正しいか確認し、正しければディレクトリを作ってください": (
        "check GPU_RESOURCE_FILE and /etc/gpu-resource-file; if they are right, make the directory"
    ),
    "インストールしたツールには、プールの場所の指定が要ります": "an installed tool has to be told where the pool is",
    "/etc/gpu-resource-file の 1 行目か GPU_RESOURCE_FILE に、状態ファイルの絶対パスを書いてください": (
        "write the absolute path of the state file into the first line of /etc/gpu-resource-file or GPU_RESOURCE_FILE"
    ),
    "1 行目が空です": "its first line is empty",
    "1 行目に状態ファイルの絶対パスを書くか、このファイルを消してください": (
        "write the absolute path of the state file into its first line, or delete it"
    ),
    "このファイルを読めるようにするか、消してください": "make this file readable, or delete it",
    "ディレクトリです": "it is a directory",
    "GPU_RESOURCE_FILE や /etc/gpu-resource-file には、ディレクトリではなく状態ファイルのパスを指定してください": (
        "in GPU_RESOURCE_FILE or /etc/gpu-resource-file, name the state file, not a directory"
    ),
    "通常のファイルではありません": "it is no regular file",
    "待っている間に移動されました": "it was moved while we waited",
    "書き込めない内容です ({})": "this content cannot be written ({})",
    "ファイルは変更していません。内容を確認してください": "the file is as it was; check the content",
    "変更は書き込まれましたが、ディスクへの保存を確認できません ({})": (
        "the change is written, but the disk does not confirm it ({})"
    ),
    "ディスクを確認し、--detail で現在の状態を確かめてください": "check the disk, and see with --detail how it stands",
    "ディスクの空き容量を増やしてから再実行してください": "make room on the disk and try again",
    "ディスクの割り当て (quota) を確認してから再実行してください": "check your disk quota and try again",
    "ファイルサイズの制限 (ulimit -f) を確認してから再実行してください": (
        "check the limit on the size of files (ulimit -f) and try again"
    ),
    "状態ファイルだけをマウントせず、それを含むディレクトリをマウントしてください": (
        "do not mount the state file alone, but the directory that it lies in"
    ),
    "プロセス数の制限 (ulimit -u) を確認してから再実行してください": (
        "check the limit on the number of processes (ulimit -u) and try again"
    ),
    "開いているファイルを減らすか、ulimit -n を増やしてから再実行してください": (
        "close some files or raise ulimit -n, and try again"
    ),
    "読む権限を持つ人に頼んでください。要らないものなら、--reset --yes で作り直せます (元のファイルは保存されます)": (
        "ask somebody who may read it; if nobody needs it, --reset --yes makes it anew (the file of now is kept aside)"
    ),
    "ディレクトリとファイルの権限を確認してください": "check the permissions of the directory and the file",
    "状態ファイルのディレクトリが存在するか確認してください": "check that the directory of the state file exists",
    "ロックが使えるローカルディスク上のファイルを GPU_RESOURCE_FILE で指定してください": (
        "name a file on a local disk, where locks work, in GPU_RESOURCE_FILE"
    ),
    "ディスクとディレクトリの状態を確認してください": "check the disk and the directory",
    # The library: the document
    "UTF-8 として読めません ({} バイト目)": "it is no UTF-8 (byte {})",
    "JSON の入れ子が深すぎます": "its JSON is nested too deeply",
    "JSON として読めません ({})": "it is no JSON ({})",
    "{} は有限の数ではありません": "{} is no finite number",
    "最上位": "top level",
    "version {!r} には対応していません ({!r} のみ。新しい版のものなら、このツールを更新してください)": (
        "version {!r} is not supported (only {!r}; if a later release made it, update this tool)"
    ),
    "servers が空です": "servers is empty",
    "lease の型が str ではありません": "lease is no str",
    "JSON オブジェクトではありません": "it is no JSON object",
    "がありません": "is missing",
    "の型が {} ではありません": "is not of the type {}",
    "が負の数です ({})": "is negative ({})",
    "に制御文字が含まれています": "has control characters",
    "が 0 以上の整数の昇順リストではありません": "is no ascending list of whole numbers from 0 up",
    "disabled が、空いていない GPU の番号と理由の組ではありません": (
        "disabled does not give the reason of GPU indices that are not available"
    ),
    "GPU 0 から total_gpus - 1 までが、available_gpus と allocated_gpus (と disabled) に一度ずつ現れていません": (
        "GPUs 0 to total_gpus - 1 do not stand once each in available_gpus and allocated_gpus (and disabled)"
    ),
    "空きと割り当て済みの CPU の合計が total_cpus と一致しません": (
        "available and allocated CPUs do not add up to total_cpus"
    ),
    "{} {!r} が重複しています": "{} {!r} occurs twice",
    "が文字列ではありません": "is no text",
    "が空です": "is empty",
    "が {} 文字を超えています": "has more than {} characters",
    "は - で始められません": "must not begin with -",
    "に制御文字または不正な文字が含まれています": "has control characters or characters that are not valid",
    "サーバー名": "name of the server",
    "サーバーの GPU 数": "number of GPUs of the server",
    "サーバーの CPU 数": "number of CPUs of the server",
    " 他 {} 件": " and {} more",
    # The library: the log
    "使えない状態ファイルを %s に保存し、作り直しました": "the state file was of no use; kept as %s, and made anew",
    "リソース不足: %s": "No room: %s",
    "タスク %s の記録を消しましたが、プロセスが動いています: %s": (
        "the record of task %s is gone, but its processes are running: %s"
    ),
    "プロセスが動いているタスクは残しました (--stop で終了できます): %s": (
        "tasks whose processes run were left (--stop ends them): %s"
    ),
    "終了したタスクを回収しました: %s": "reclaimed tasks that have ended: %s",
    # The command line: screens
    "  対処: {}": "  What to do: {}",
    "  例: {}": "  Example: {}",
    "サーバー": "Server",
    "GPU利用可/合計": "GPUs free/all",
    "GPU使用率": "GPU use",
    "CPU利用可/合計": "CPUs free/all",
    "CPU使用率": "CPU use",
    "実行中タスク": "Running tasks",
    "GPU リソース状態": "GPU resources",
    "タスク": "Task",
    "利用者": "User",
    "経過": "Age",
    "種類": "Kind",
    "ジョブ": "job",
    "予約": "reservation",
    "待機": "waiting",
    "{} 個": "{}",
    "{} 日": "{} d",
    "{} 時間": "{} h",
    "{} 分": "{} min",
    "{} 秒": "{} s",
    "  使用停止: {} の GPU {}": "  Out of service: {} GPU {}",
    "プール: {}": "Pool: {}",
    "  まだありません。最初の割り当てか --init が作ります": "  not there yet: the first allocation or --init makes it",
    "  架空のサーバー (登録: {0} --detect か {0} --server NAME:GPUS:CPUS)": (
        "  made-up servers (use {0} --detect or {0} --server NAME:GPUS:CPUS)"
    ),
    "合計:": "Total:",
    "  GPU: {}/{} 利用可能": "  GPU: {}/{} available",
    "  CPU: {}/{} 利用可能": "  CPU: {}/{} available",
    "  実行中タスク: {}": "  Running tasks: {}",
    "  待機中の要求: {}": "  Waiting requests: {}",
    "  終了済み (次の変更で回収): {}": "  Ended (the next change reclaims them): {}",
    "  1 タスクの範囲: GPU {}-{}、CPU 1-{}": "  One task may have: GPU {}-{}, CPU 1-{}",
    "GPU リソース詳細": "GPU resources in detail",
    "  利用可能GPU: {} ({}/{})": "  Available GPUs: {} ({}/{})",
    "  利用可能CPU: {}/{}": "  Available CPUs: {}/{}",
    " (終了済み: 次の変更で回収)": " (ended: the next change reclaims it)",
    "      CPU数: {}": "      CPUs: {}",
    "      開始時刻: {}": "      Start: {}",
    "      要求元: {}": "      Asked by: {}",
    "      プロセス: {}": "      Process: {}",
    "待機中 {}: {} (GPU {}, CPU {}, {})": "Waiting {}: {} (GPU {}, CPU {}, {})",
    " (終了済み)": " (ended)",
    "最終更新: {}": "Last change: {}",
    "  サーバー: {}\n  GPU ID: {}\n": "  Server: {}\n  GPU ID: {}\n",
    "  CPU数: {}\n": "  CPUs: {}\n",
    "✓ リソース割り当て成功:\n{}{}\n": "✓ Resources allocated:\n{}{}\n",
    "✓ リソース割り当て成功！\n{}  GPUデバイス文字列: {}\n{}\n": "✓ Allocation succeeded!\n{}  GPU devices: {}\n{}\n",
    "使用ヒント:\n  export CUDA_VISIBLE_DEVICES={}\n  export CUDA_DEVICE_ORDER=PCI_BUS_ID\n\n": (
        "How to use them:\n  export CUDA_VISIBLE_DEVICES={}\n  export CUDA_DEVICE_ORDER=PCI_BUS_ID\n\n"
    ),
    "リソース解放:\n{}": "To release them:\n{}",
    "待機中 ({} 番目): {}": "Waiting (number {}): {}",
    "… 他 {} 行": "… {} more lines",
    # The command line: commands
    "✓ 初期化完了 (既存の状態は上書きしません): {}\n": "✓ The pool is there (nothing is overwritten): {}\n",
    "--watch を表示する端末がありません\n  対処: 端末で実行するか、--watch を外してください": (
        "There is no terminal to show --watch on\n  What to do: run it in a terminal, or leave --watch out"
    ),
    "リソース割り当てを試行中:\n  タスクID: {}\n  GPU数: {}\n  CPU数: {}\n": (
        "Asking for resources:\n  Task ID: {}\n  GPUs: {}\n  CPUs: {}\n"
    ),
    "リソース不足: {}": "No room: {}",
    "空きが出てから再実行するか、--wait で待ってください": "try again when there is room, or wait with --wait",
    "空きが出てから再実行してください": "try again when there is room",
    "タスクID: {}": "Task ID: {}",
    "✓ {} の GPU {} で実行します: {}": "✓ On {}, with GPU {}, runs: {}",
    "✗ 解放を記録できませんでした: {}\n  対処: 次のコマンドが自動で回収します": (
        "✗ The release could not be recorded: {}\n  What to do: nothing, the next command reclaims it"
    ),
    "リソース解放を試行中: {}": "Releasing: {}",
    "✓ リソース解放完了: {task_id}\n✓ リソース解放成功！": "✓ Released: {task_id}\n✓ Release succeeded!",
    "タスクのプロセスを終了中: {}": "Ending the processes of the task: {}",
    "✓ プロセスは終了し、GPU は空きました: {task_id}": "✓ The processes have ended, the GPUs are free: {task_id}",
    "--detail で実行中のタスクIDを確認してください": "see the task IDs with --detail",
    "注意: {}": "Note: {}",
    "確認するための端末がないため、リセットしません": "No reset: there is no terminal to ask on",
    "確認を省くには --reset --yes を指定してください": "to go without the question, use --reset --yes",
    "警告：すべての実行中タスクの記録がクリアされます！": "Warning: the records of all running tasks will be cleared!",
    "  ファイル: {}\n  消える記録: {}": "  File: {}\n  Records that go: {}",
    "なし": "none",
    "続行しますか？ [y/N]:": "Go ahead? [y/N]:",
    "はい": "はい",
    "リセットを中止しました": "No reset",
    "消してよければ y と答えてください": "if they may go, answer y",
    "✓ システムリセット完了": "✓ The pool is reset",
    "✓ メトリクスを書きました: {metrics_file}": "✓ Wrote the metrics: {metrics_file}",
    "✓ サーバーを追加しました: {server_name} (ID: {server_id})": "✓ Added the server {server_name} (ID: {server_id})",
    "✓ サーバーを外しました: {server_name}": "✓ Removed the server {server_name}",
    "  そこで動いているタスクは、終わるまでそのまま続きます": "  Tasks that run there go on until they end",
    "✓ 使用を再開しました: {}": "✓ Back in service: {}",
    # The command line: the parser
    "引数が正しくありません: {}": "Wrong usage: {}",
    "{} --help で使い方を確認してください": "see {} --help",
    "整数ではありません: {!r}": "no whole number: {!r}",
    "時間ではありません (90、5m、2h、1d のように指定します): {!r}": "no time, such as 90, 5m, 2h, 1d: {!r}",
    "NAME:GPUS:CPUS の形ではありません: {!r}": "not of the form NAME:GPUS:CPUS: {!r}",
    "制御文字を含む引数は使えません: {!r}": "an argument with control characters cannot be used: {!r}",
    "{} は一度だけ指定してください": "{} can be given only once",
    "コマンドは --run TASK_ID GPUS CPUS -- COMMAND … の形で指定してください": (
        "a command is given as --run TASK_ID GPUS CPUS -- COMMAND …"
    ),
    "{} は {} と一緒に指定してください": "{} goes with {}",
    "{} と {} は一緒に指定できません": "{} and {} do not go together",
    # The command line: main
    "GPU_RESOURCE_LANG の言語はありません: {!r}": "GPU_RESOURCE_LANG: no language that we speak: {!r}",
    "タスクIDを正確に出力できません: {!r}": "The task ID cannot be written exactly: {!r}",
    "この端末の文字コードで表せるタスクIDを指定してください": (
        "use a task ID that the encoding of this terminal has the characters of"
    ),
    "GPU リソースマネージャー v{}": "GPU resource manager v{}",
    "必要なパッケージを読み込めません: {}": "A package is missing: {}",
    "cd {} && python3 -m venv .venv && .venv/bin/pip install -r requirements_v01.txt を実行してください": (
        "run cd {} && python3 -m venv .venv && .venv/bin/pip install -r requirements_v01.txt"
    ),
    "gpu_resource_extensions を {} に置いてください": "put gpu_resource_extensions into {}",
    "中断しました": "Interrupted",
    "--detail で現在の状態を確認できます": "see with --detail how things stand",
    "✗ 出力できません: {}\n  対処: {}": "✗ The output cannot be written: {}\n  What to do: {}",
    "出力先を直し、--detail で現在の状態を確かめてください": (
        "mend where the output goes, and see with --detail how things stand"
    ),
    # Leases
    "タスク {task_id!r} を終了できません。{reason}\n  対処: {remedy}": (
        "Task {task_id!r} cannot be stopped: {reason}\n  What to do: {remedy}"
    ),
    "プロセスとの結び付きがありません": "it is not bound to processes",
    "プロセスは自分で終了させ、--release {name} で返してください": (
        "end its processes yourself, then use --release {name}"
    ),
    "別の計算機 ({host}) で動いています": "it runs on another machine ({host})",
    "{host} で --stop {name} を実行してください": "use --stop {name} on {host}",
    "プロセスとの結び付き (.leases/ のファイル) が失われています": "its lease (a file in .leases/) is lost",
    "プロセスが残っていないことを確かめて、--release {name} --force で返してください": (
        "see that no process of it is left, then use --release {name} --force"
    ),
    "このコマンド自身がその中で動いています": "this very command runs inside it",
    "別の端末で --stop {name} を実行してください": "use --stop {name} in another terminal",
    "ここからは見えないプロセス": "processes that cannot be seen from here",
    "終了しないプロセスがあります: {who}": "some processes do not end: {who}",
    "その利用者か管理者として --stop {name} を実行してください (誰が持つかは --detail で分かります)": (
        "use --stop {name} as that user or as root (--detail shows who holds it)"
    ),
    # --run, --detect
    "コマンドを実行できません: {word}: {reason}\n  対処: コマンドの綴り、PATH、実行権限を確認してください": (
        "The command cannot be run: {word}: {reason}\n  What to do: check its spelling, PATH, and that it is executable"
    ),
    "注意: タスク {0} のプロセスがまだ動いています: {1}。終わるまで GPU は返りません (--stop {0} で終了できます)": (
        "Note: processes of task {0} are still running: {1}; until they end, their GPUs are held (--stop {0} ends them)"
    ),
    "コマンドを始められません: {reason}\n  対処: ulimit -n と ulimit -u を確認してから再実行してください": (
        "The command cannot be started: {reason}\n  What to do: check ulimit -n and ulimit -u, and try again"
    ),
    "{problem}\n  対処: {remedy}--init --server NAME:GPUS:CPUS で台数を指定してください": (
        "{problem}\n  What to do: {remedy}give the numbers with --init --server NAME:GPUS:CPUS"
    ),
    "GPU の数が分かりません: nvidia-ml-py を読み込めません ({})": (
        "The number of GPUs is not known: nvidia-ml-py cannot be loaded ({})"
    ),
    "この Python ({}) に pip で nvidia-ml-py をインストールするか、": (
        "install nvidia-ml-py into this Python ({}) with pip, or "
    ),
    "GPU の数が分かりません: NVML: {}": "The number of GPUs is not known: NVML: {}",
    "ドライバを確認するか、": "check the driver, or ",
    "この計算機に NVIDIA GPU はありません": "This machine has no NVIDIA GPU",
    "{problem}\n  対処: {remedy}": "{problem}\n  What to do: {remedy}",
    # Servers
    "がプールにありません": "is not in this pool",
    "のサーバーは既にあります": "is a server of this pool already",
    "別の名前を指定してください": "use another name",
    "がサーバー {name} の GPU の番号ではありません": "are no GPU indices of the server {name}",
    "0-{last} の番号を , で区切って指定してください": "give indices from 0 to {last}, separated by commas",
    "制御文字を含まない {most} 文字以内の文字列を指定してください": (
        "give a text of at most {most} characters without control characters"
    ),
    "理由": "the reason",
    "サーバー {name} を外せません。{reason}\n  対処: {remedy}": (
        "The server {name} cannot be removed: {reason}\n  What to do: {remedy}"
    ),
    "タスクが動いているか待っています ({tasks})": "tasks run or wait there ({tasks})",
    "終わるのを待つか --release で取り消してから、再実行してください (--disable {name} は新しいタスクを入れません)": (
        "wait until they end, or cancel them with --release, and try again (--disable {name} keeps new ones away)"
    ),
    "最後のサーバーです": "it is the last one",
    "別のサーバーを --add-server で登録してから再実行してください": "add another one with --add-server first",
    # Several machines
    "タスク {task_id!r} の割り当てを引き継げません: {server} の {path} に、この割り当てはもうありません\n"
    "  対処: 両方の計算機の /etc/gpu-resource-file が同じプールを指すことを確かめ、もう一度実行してください": (
        "The claim of task {task_id!r} cannot be taken over: on {server}, {path} does not have it any more\n"
        "  What to do: see that /etc/gpu-resource-file names the same pool on both machines, and try again"
    ),
    "は使えません。別の計算機がサーバー {name} として使われています": (
        "cannot be used: another machine is the server {name}"
    ),
    "この計算機に別の名前を付けて --add-server で登録するか、計算機を取り替えたなら --remove-server {name} の後で "
    "--add-server をやり直してください": (
        "give this machine another name and add it with --add-server, or, if it was replaced, "
        "use --remove-server {name} and then --add-server again"
    ),
    "のプールは 1 台のもので、他のサーバーでは実行できません": (
        "is a pool of one machine: nothing can be run on another one"
    ),
    "/etc/gpu-resource-file に postgresql:// か redis:// の場所を書くか、--any と --on を外してください": (
        "write a postgresql:// or redis:// place into /etc/gpu-resource-file, or leave --any and --on out"
    ),
    "が長すぎます (ssh で渡せるのは {most} バイトまで、これは {bytes} バイト)": (
        "is too long (ssh can hand over {most} bytes, and this is {bytes})"
    ),
    "がコマンドとして読めません": "cannot be read as a command",
    "ssh のコマンドを、シェルに書くとおりに指定してください": "give the ssh command as you would write it in a shell",
    "引数をファイルに書き、コマンドからそれを読んでください": (
        "write the arguments into a file, and let the command read that"
    ),
    "どのサーバーでも始められませんでした: {names}\n"
    "  対処: ssh {first} gpu-resource --status が同じプールを表示することを確認してください"
    " (ssh や接続先のメッセージは上にあります)": (
        "It could be started on no server: {names}\n"
        "  What to do: see that ssh {first} gpu-resource --status shows the same pool"
        " (what ssh and the other end had to say stands above)"
    ),
    "{server} で作業ディレクトリに入れません: {directory}: {reason}\n"
    "  対処: 全サーバーで共有しているディレクトリで実行してください": (
        "The working directory cannot be entered on {server}: {directory}: {reason}\n"
        "  What to do: run it in a directory that all servers share"
    ),
    "注意: {0} との接続が切れましたが、タスク {1} の記録は残っています (--detail で確認できます)": (
        "Note: the connection to {0} is gone, but the record of task {1} is there (see --detail)"
    ),
    "✗ {} で何が起きたか確認できません: {}": "✗ What has happened on {} cannot be found out: {}",
    "注意: {} でタスク {} が始まったか確認できません。割り当ては失効しました": (
        "Note: whether task {1} was started on {0} cannot be found out: its claim has lapsed"
    ),
    "注意: 標準入力の先頭が失われたかもしれないため、他のサーバーでは始めません": (
        "Note: the beginning of stdin may be lost by now, so it is started on no other server"
    ),
    "注意: {} では始められませんでした": "Note: it could not be started on {}",
    "は --any や --on が渡すものではありません": "is not what --any or --on hands over",
    "--run … --any か --run … --on NAME を使ってください": "use --run … --any or --run … --on NAME",
    "✓ 終了したタスクの回収完了: {}": "✓ Reclaimed what has ended: {}",
    # Databases
    "ロック取得タイムアウト\n  {path} の変更を {timeout_s:g} 秒待ちましたが、別のプロセスが使用中です\n"
    "  対処: しばらくして再実行してください": (
        "Lock not had in time\n  waited {timeout_s:g} s to change {path}, but other processes use it\n"
        "  What to do: try again later"
    ),
    "のデータベースには対応していません": "is of a database that we do not know",
    "postgresql://、redis://、rediss:// のいずれかで始まる場所を指定してください": (
        "use a place that begins with postgresql://, redis:// or rediss://"
    ),
    "プールは変更していません。内容を確認してください": "the pool was left as it was; check what was to be written",
    "変更が保存されたか確認できません ({})": "it is not known whether the change was stored ({})",
    "データベースの状態を確認し、--detail で現在の状態を確かめてください": (
        "check the database, and see with --detail how things stand"
    ),
    "データベースにプールの文書がありません": "the database holds no document of a pool",
    "データベースに必要なパッケージを読み込めません: {reason}\n"
    '  対処: この Python ({python}) に pip install "{package}" でインストールしてください': (
        "The package for this database cannot be loaded: {reason}\n"
        '  What to do: into this Python ({python}), use pip install "{package}"'
    ),
    "サーバーの応答がありません": "the server does not answer",
    "データベースに接続できません。再試行しています: {}": "No connection to the database, trying again: {}",
    "が Redis の URL として読めません": "cannot be read as a Redis URL",
    "redis://USER:PASSWORD@HOST:PORT/NUMBER の形で指定してください": (
        "give it as redis://USER:PASSWORD@HOST:PORT/NUMBER"
    ),
    "サーバーの設定では、行った変更が失われることがあります ({})": (
        "as the server is set, changes that were made can be lost ({})"
    ),
    (
        "appendonly yes、appendfsync always、no-appendfsync-on-rewrite no、maxmemory-policy noeviction と設定し、"
        "CONFIG GET を許可してください。失われてもよければ URL に ?unsafe=1 を付けてください"
    ): (
        "set appendonly yes, appendfsync always, no-appendfsync-on-rewrite no and maxmemory-policy noeviction, and "
        "allow CONFIG GET; if they may be lost, add ?unsafe=1 to the URL"
    ),
    "{} 台の複製 (replica) による確認がありません": "{} replicas should have confirmed it, and have not",
    "URL の redis:// か rediss:// か、証明書の指定 (ssl_ca_certs など) を確認してください": (
        "check whether the URL should begin with redis:// or rediss://, and its certificates (such as ssl_ca_certs)"
    ),
    "URL のユーザー名とパスワード、サーバーの ACL を確認してください": (
        "check user name and password in the URL, and the ACL of the server"
    ),
    "複製 (replica) ではなく、プライマリの URL を指定してください": "use the URL of the primary, not of a replica",
    "サーバーのメモリーの上限 (maxmemory)、ディスクの空き、ログを確認してください": (
        "check the maxmemory of the server, its free disk space, and its log"
    ),
    "複製 (replica) が動いているか、サーバーの min-replicas-to-write が正しいか確認してください": (
        "see that the replicas run, and that min-replicas-to-write of the server is right"
    ),
    "Redis Cluster には対応していません。単独のサーバーの URL を指定してください": (
        "Redis Cluster will not do: use the URL of a single server"
    ),
    "Redis が動いているか、URL (rediss:// なら TLS) が正しいか確認してください": (
        "see that Redis runs, and that the URL (with rediss:// TLS too) is right"
    ),
    "が PostgreSQL の URL として読めません": "cannot be read as a PostgreSQL URL",
    "postgresql://USER@HOST/DATABASE の形で指定してください": "give it as postgresql://USER@HOST/DATABASE",
    "URL のユーザー名、パスワード (~/.pgpass など)、サーバーの pg_hba.conf を確認してください": (
        "check the user name in the URL, the password (in ~/.pgpass, say), and pg_hba.conf of the server"
    ),
    "URL の service の名前と、service ファイルを読む権限を確認してください": (
        "check the name of the service in the URL, and that you may read the service file"
    ),
    "URL のデータベース名を確認し、まだなければ createdb で作ってください": (
        "check the name of the database in the URL; if there is none yet, make it with createdb"
    ),
    "URL の sslmode と sslrootcert、サーバーの TLS の設定を確認してください": (
        "check sslmode and sslrootcert in the URL, and how TLS is set up at the server"
    ),
    "テーブルを読み書きする権限 (--init には CREATE も) を、管理者に頼んでください": (
        "ask the administrator for the right to read and write the tables (and CREATE for --init)"
    ),
    "データベースのサーバーのディスクの空き容量を増やしてから再実行してください": (
        "make room on the disk of the database server, and try again"
    ),
    "ENCODING 'UTF8' のデータベースを使ってください": "use a database with ENCODING 'UTF8'",
    "書き込めるサーバー (primary) を URL に加え、target_session_attrs=read-write を指定してください": (
        "add the server that can be written to (the primary) to the URL, and target_session_attrs=read-write"
    ),
    "サーバーの max_connections を増やすか、しばらくしてから再実行してください": (
        "raise max_connections of the server, or try again later"
    ),
    "データベースのサーバーが動いているか、URL のホスト名とポート番号が正しいか確認してください": (
        "see that the database server runs, and that host name and port in the URL are right"
    ),
    # Metrics
    "メトリクスに必要なパッケージを読み込めません: {reason}\n"
    '  対処: この Python ({python}) に pip install "{package}" でインストールしてください': (
        "The package for metrics cannot be loaded: {reason}\n"
        '  What to do: into this Python ({python}), use pip install "{package}"'
    ),
    "メトリクスをファイルに書けません: {path}\n  原因: {reason}\n  対処: {remedy}": (
        "The metrics cannot be written to the file: {path}\n  Cause: {reason}\n  What to do: {remedy}"
    ),
    "通常のファイルか、まだないファイルを指定してください": "name a regular file, or one that is not there yet",
    "ディレクトリ {} を作るか、node_exporter が読むディレクトリのファイルを指定してください": (
        "make the directory {}, or name a file in the one that node_exporter reads"
    ),
    "ディレクトリ {} に書ける利用者として実行してください": "be a user who may write in the directory {}",
    "ディレクトリとディスクの状態を確認してください: {}": "check the directory and the disk: {}",
    # Docker
    "コンテナを始められません: {reason}\n  対処: {remedy}": (
        "The container cannot be started: {reason}\n  What to do: {remedy}"
    ),
    "GPU を借りていません (GPU_TASK_ID、GPU_TASK_CPUS、CUDA_VISIBLE_DEVICES が揃っていません)": (
        "no GPUs are borrowed (GPU_TASK_ID, GPU_TASK_CPUS or CUDA_VISIBLE_DEVICES is missing)"
    ),
    "gpu-resource --run NAME GPUS CPUS -- gpu-resource-docker IMAGE COMMAND のように実行してください": (
        "run it as in gpu-resource --run NAME GPUS CPUS -- gpu-resource-docker IMAGE COMMAND"
    ),
    "今のディレクトリに入れません: {}": "the current directory cannot be entered: {}",
    "存在するディレクトリに移ってから実行してください": "run it in a directory that is there",
    "使い方: gpu-resource --run NAME GPUS CPUS -- gpu-resource-docker [docker run のオプション] IMAGE [COMMAND …]\n"
    "借りた GPU だけが見えるコンテナで COMMAND を実行します": (
        "Usage: gpu-resource --run NAME GPUS CPUS -- gpu-resource-docker [OPTIONS of docker run] IMAGE [COMMAND …]\n"
        "Run COMMAND in a container that sees the borrowed GPUs alone"
    ),
    "注意: docker のクライアントが終了しました。コンテナが終わるまで GPU を返しません: {}": (
        "Note: the docker client has ended. The GPUs are held until the container has ended too: {}"
    ),
    (
        "注意: docker が終了コード 125 で終わりました。docker 自身の失敗なら、理由は上にあります\n"
        "  対処: デーモンに接続できないなら docker ps が動くか、could not select device driver なら "
        "NVIDIA Container Toolkit があるか、それ以外はイメージの名前とオプションを確認してください"
    ): (
        "Note: docker has ended with exit code 125. If docker itself has failed, the reason stands above\n"
        "  What to do: if there is no connection to the daemon, see whether docker ps works; if it says could not "
        "select device driver, whether the NVIDIA Container Toolkit is there; else check the image and the options"
    ),
    # Airflow
    "に使えない項目があります": "has an entry that there is no use for",
    "{known} だけを指定してください": "give {known} only",
    "はこの種類のタスクには付けられません": "cannot be put on tasks of this kind",
    "with gpu_allocation(...) as gpus: の中に置き、環境変数に gpus['environment'] を渡してください": (
        "place it in a block with gpu_allocation(...) as gpus: and let its environment be gpus['environment']"
    ),
    "は、タスクの関数に付けるときは指定できません": "cannot be given for the function of a task",
    "指定をやめてください (タスクが動く計算機の GPU を使います)": (
        "leave it out (it uses GPUs of the machine that the task runs on)"
    ),
    # The page
    (
        "ページに必要なパッケージを読み込めません: {reason}\n"
        "  対処: この Python ({python}) に pip install starlette uvicorn prometheus-client でインストールしてください"
    ): (
        "A package that the page needs is missing: {reason}\n"
        "  What to do: pip install starlette uvicorn prometheus-client into this Python ({python})"
    ),
    (
        "{host} のポート {port} で待ち受けられません: {reason}\n"
        "  対処: --host と --port を確認し、使用中なら別のポートを指定してください"
    ): (
        "Nobody can listen on port {port} of {host}: {reason}\n"
        "  What to do: check --host and --port; if it is in use, give another port"
    ),
    "引数が正しくありません: {problem}\n  対処: {remedy}": "Wrong usage: {problem}\n  What to do: {remedy}",
    "--port が 0-65535 の整数ではありません: {!r}": "--port is no integer from 0 to 65535: {!r}",
    "--allowed-host がホスト名ではありません (ポート番号は付けません): {!r}": (
        "--allowed-host is no host name (without a port): {!r}"
    ),
    "--prometheus が http:// か https:// で始まる URL ではありません: {!r}": (
        "--prometheus is no URL that begins with http:// or https://: {!r}"
    ),
    "ページ: {} (Ctrl-C で終了)": "The page: {} (Ctrl-C ends it)",
    "このホスト名では見られません (起動時に --allowed-host で指定します)": (
        "not to be seen under this host name (--allowed-host allows it at the start)"
    ),
    "自動更新中": "Live",
    "{} 秒ごとに読み込み直します": "Loaded anew every {} seconds",
    "モニターとの接続が切れています。表示しているのは {} の状態です": (
        "The connection to the monitor is lost. This is how things stood at {}"
    ),
    "プールを読めません": "The pool cannot be read",
    "プールからの応答を待っています": "Waiting for an answer of the pool",
    "表示しているのは {} の状態です": "This is how things stood at {}",
    "空き GPU": "GPUs free",
    "空き CPU": "CPUs free",
    "実行中": "Running",
    "待機中": "Waiting",
    "直近 24 時間の GPU 使用率": "GPU use over the last 24 hours",
    "現在 {:.0%}、平均 {:.0%}": "{:.0%} now, {:.0%} mean",
    "Prometheus から得られません ({})": "not to be had from Prometheus ({})",
    "24 時間前": "24 hours ago",
    "現在": "Now",
    "空き": "free",
    "使用中": "held",
    "停止": "off",
    "使用停止": "out of service",
    "終了": "ended",
    "終了済み": "ended",
    "終了済み (次の変更で回収)": "ended (taken back with the next change)",
    "使用停止: GPU {}": "Out of service: GPU {}",
    "待ち行列": "The line",
    "待っている要求はありません": "Nobody is waiting",
    "サーバー一覧": "Servers",
    "タスク一覧": "Tasks",
    "順番": "No.",
    "待ち時間": "Waits for",
    "動いているタスクはありません": "No task is running",
    "1 分未満": "< 1 min",
    """\
使い方: {} [オプション]

プールの様子を表示するページ (読み取り専用)。/metrics、/api/status、/api/detail もある

オプション:
  --host ADDRESS                   待ち受けるアドレス (指定しなければ 127.0.0.1)
  --port PORT                      待ち受けるポート (指定しなければ 8765)
  --allowed-host NAME              ほかに許すホスト名。リバースプロキシの名前など (繰り返し可)
  --prometheus URL                 使用率の履歴を Prometheus から得る (なければ起動後のもの)
  -h, --help                       これを表示する
""": """\
usage: {} [options]

A page that shows how the pool stands (it only reads), with /metrics, /api/status and /api/detail

Options:
  --host ADDRESS                   the address to listen on (127.0.0.1 unless given)
  --port PORT                      the port to listen on (8765 unless given)
  --allowed-host NAME              another host name to answer to, such as a reverse proxy's (again for each)
  --prometheus URL                 take the past use from Prometheus (else since the start)
  -h, --help                       show this
""",
    # Help
    """\
usage: {} コマンド [オプション]

GPU リソースマネージャー: 数台の GPU サーバーを数人で共有する

コマンド:
  --init                           状態ファイルがなければ作成する
  --status                         リソース状態を表示する
  --detail                         サーバーとタスクの詳細を表示する
  --allocate TASK_ID GPUS CPUS     タスクに GPU と CPU を割り当てる
  --run TASK_ID GPUS CPUS -- コマンド …
                                   コマンドをこの計算機の GPU で実行し、終わったら解放する
  --release TASK_ID                タスクのリソースを解放する
  --stop TASK_ID                   タスクのプロセスを終了させて解放する
  --reclaim                        この計算機で終了したタスクを回収する (定期実行用)
  --metrics FILE                   Prometheus のメトリクスをファイルに書く (node_exporter 用)
  --take CLAIM JOB                 --any と --on が接続先で使う (手では使わない)
  --reset                          すべてのタスクの記録を消す (確認あり)
  --add-server NAME:GPUS:CPUS      サーバーを追加する
  --remove-server NAME             使われていないサーバーを外す
  --disable NAME[:GPU,…]           サーバーか GPU に新しいタスクを入れない
  --enable NAME[:GPU,…]            その使用を再開する
  --version                        バージョンを表示する
  -h, --help                       この使い方を表示する
  TASK_ID を - にすると、--allocate と --run は重ならない名前を付けて、それを表示する

オプション:
  --prefer-server ID               --allocate で優先するサーバーの ID か名前
  --wait [SECONDS]                 --allocate と --run で、空くまで待つ (90、5m、2h、1d。省くと無期限)
  --any                            --run を、空きのあるサーバーで ssh により実行する
  --on NAME                        --run を、そのサーバーで ssh により実行する
  --export                         --allocate の結果を eval "$(…)" のための行で出力する
  --force                          --release、--stop で他の利用者のタスクも対象にする。
                                   --release、--reset で動いているタスクの記録も消す
  --grace SECONDS                  --stop で強制終了するまでの秒数 (指定しなければ 10)
  --server NAME:GPUS:CPUS          --init と --reset で実際のサーバーを登録する (繰り返し可)
  --detect                         --init と --reset でこの計算機を調べて登録する
  --min-gpus N                     --init と --reset で 1 タスクの最小 GPU 数を決める
  --reason TEXT                    --disable の理由 (--status に表示される)
  --watch [SECONDS]                --status を Ctrl-C まで繰り返す (秒数を省くと 2)
  --yes                            --reset の確認を省く
  --json                           結果を 1 つの JSON 文書で出力する

環境変数:
  GPU_RESOURCE_FILE                状態ファイルか postgresql:// か redis://
                                   (なければ /etc/gpu-resource-file の 1 行目)
  GPU_RESOURCE_SERVER              この計算機にあたるサーバーの名前
  GPU_RESOURCE_LANG                en: English
  GPU_RESOURCE_SSH                 --any と --on の ssh コマンド (なければ ssh)
  GPU_RESOURCE_REMOTE              その接続先のコマンド (なければ gpu-resource)

終了コード:
  0 成功 / 1 答えは「いいえ」 / 2 引数の誤り / 74 読み書きの失敗 / 75 後で再試行 /
  125 --run の失敗 / 126 実行不可 / 127 コマンドなし / 130 中断
""": """\
usage: {} COMMAND [options]

GPU resource manager: several people share a few GPU servers

Commands:
  --init                           make the pool if there is none
  --status                         show what is free and who has what
  --detail                         show servers and tasks in detail
  --allocate TASK_ID GPUS CPUS     give a task GPUs and CPUs
  --run TASK_ID GPUS CPUS -- COMMAND …
                                   run a command on GPUs of this machine, release them when it ends
  --release TASK_ID                release what a task holds
  --stop TASK_ID                   end the processes of a task and release what it holds
  --reclaim                        take back what has ended on this machine (for a timer)
  --metrics FILE                   write Prometheus metrics to a file (for node_exporter)
  --take CLAIM JOB                 what --any and --on use at the other end (not by hand)
  --reset                          clear the records of all tasks (asks first)
  --add-server NAME:GPUS:CPUS      add a server
  --remove-server NAME             remove a server that nobody uses
  --disable NAME[:GPU,…]           place nothing new on a server, or on some of its GPUs
  --enable NAME[:GPU,…]            put them back in service
  --version                        show the version
  -h, --help                       show this
  With - as TASK_ID, --allocate and --run make a name of their own and say it

Options:
  --prefer-server ID               id or name of the server that --allocate tries first
  --wait [SECONDS]                 with --allocate and --run: wait (90, 5m, 2h, 1d; for ever without)
  --any                            with --run: on whatever server has room, through ssh
  --on NAME                        with --run: on that server, through ssh
  --export                         print the result of --allocate as lines for eval "$(…)"
  --force                          with --release, --stop: tasks of others too;
                                   with --release, --reset: records of tasks that run, too
  --grace SECONDS                  with --stop: how long before it kills (10 unless given)
  --server NAME:GPUS:CPUS          with --init and --reset: a real server (again for each)
  --detect                         with --init and --reset: this machine, as it is found
  --min-gpus N                     with --init and --reset: the fewest GPUs of a task
  --reason TEXT                    with --disable: why (--status shows it)
  --watch [SECONDS]                repeat --status until Ctrl-C (every 2 s unless given)
  --yes                            with --reset: do not ask
  --json                           print the result as one JSON document

Environment:
  GPU_RESOURCE_FILE                the state file, postgresql:// or redis://
                                   (else the first line of /etc/gpu-resource-file)
  GPU_RESOURCE_SERVER              the name of the server that this machine is
  GPU_RESOURCE_LANG                en: English
  GPU_RESOURCE_SSH                 the ssh command of --any and --on (else ssh)
  GPU_RESOURCE_REMOTE              our command at its other end (else gpu-resource)

Exit codes:
  0 done / 1 the answer is no / 2 wrong usage / 74 cannot read or write / 75 try again later /
  125 failure of --run / 126 cannot be run / 127 no such command / 130 interrupted
""",
}
