package asynqwire

// ServerScript is what one of asynq's scripts does that its servers run.
type ServerScript string

// The scripts of asynq's servers, by the names of their variables in asynq's
// internal/rdb.
const (
	ScriptDequeue              ServerScript = "dequeueCmd"
	ScriptDone                 ServerScript = "doneCmd"
	ScriptDoneUnique           ServerScript = "doneUniqueCmd"
	ScriptMarkAsComplete       ServerScript = "markAsCompleteCmd"
	ScriptMarkAsCompleteUnique ServerScript = "markAsCompleteUniqueCmd"
	ScriptRequeue              ServerScript = "requeueCmd"
	ScriptRetry                ServerScript = "retryCmd"
	ScriptArchive              ServerScript = "archiveCmd"
	ScriptForward              ServerScript = "forwardCmd"
	ScriptListLeaseExpired     ServerScript = "listLeaseExpiredCmd"
	ScriptWriteServerState     ServerScript = "writeServerStateCmd"
	ScriptClearServerState     ServerScript = "clearServerStateCmd"
	ScriptDeleteExpired        ServerScript = "deleteExpiredCompletedTasksCmd"
	ScriptReclaimGroups        ServerScript = "reclaimStateAggregationSetsCmd"
)

// TestedAsynq are the versions of asynq whose scripts [ServerScriptOf] knows.
var TestedAsynq = []string{"v0.26.0"}

// serverScripts are the scripts by their hashes, as they are in [TestedAsynq]. A test reads
// them from asynq's module.
var serverScripts = map[string]ServerScript{
	"a8153319360adc71cdc370107f8ab9786f204765": ScriptDequeue,
	"1241eaa1c73409baaf1fea0c08d203a4911bda15": ScriptDone,
	"a2631c71357a54b4c3e7450b1757e7f3f49d6c81": ScriptDoneUnique,
	"117dca952700588e559c7ace20b925096d587974": ScriptMarkAsComplete,
	"ce6833ccce362a8c0ee53beee413341daf52e39c": ScriptMarkAsCompleteUnique,
	"f34cbfd11d1fc8019af55b50c447fc68eb8b29e5": ScriptRequeue,
	"65fa409c88198a681c53e0892d8276eca0145694": ScriptRetry,
	"9c3b1eb9947ce2ee5304ac013a0a365ec364fd2d": ScriptArchive,
	"522b1a6ae66fe79ea2f24a9af58798ab71879035": ScriptForward,
	"16988a462595f6ee317be300951533b004f27f5c": ScriptListLeaseExpired,
	"3c8548ad44d0dfcfde50f07ea9271d77f656042c": ScriptWriteServerState,
	"79cf8dbc80deca37314fdfdeb9fe33a12c9baad7": ScriptClearServerState,
	"49c4326d80c1db9c476da2aa7f4438d03688f82b": ScriptDeleteExpired,
	"7c08714194a1ed81153180b36590c51f1ccd7d42": ScriptReclaimGroups,
}

// ServerScriptOf returns the script with a hash, as Redis has it; false for one that isn't
// known to be a server's.
func ServerScriptOf(hash string) (ServerScript, bool) {
	s, ok := serverScripts[hash]
	return s, ok
}

// The keys at which asynq lists its servers, and the jobs that they run, by when these are
// not believed any more, in Unix seconds; and the channel on which it says the ids of jobs
// that are to be cancelled.
const (
	Servers       = "asynq:servers"
	Workers       = "asynq:workers"
	CancelChannel = "asynq:cancel"
)
