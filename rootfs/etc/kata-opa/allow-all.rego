# What kata-agent lets its runtime do: everything. An agent that is built with agent-policy loads
# default-policy.rego when it starts, and ends where that file is missing. For every call it then
# asks for the rule that is named after the call's message; a rule that is not there is a refusal.
# So each message of AgentService (protos/agent.proto of Kata up to 4.1) has a line here.
# A policy of your own, for example one by Kata's genpolicy, comes with the pod (its annotation
# io.katacontainers.config.agent.policy, or init-data) and takes the place of this one.
package agent_policy

# sandbox
default CreateSandboxRequest := true
default DestroySandboxRequest := true
default GuestDetailsRequest := true
default SetGuestDateTimeRequest := true
default ReseedRandomDevRequest := true
default SetPolicyRequest := true

# containers
default CreateContainerRequest := true
default StartContainerRequest := true
default PauseContainerRequest := true
default ResumeContainerRequest := true
default UpdateContainerRequest := true
default RemoveContainerRequest := true
default StatsContainerRequest := true
default PullImageRequest := true

# processes, and what they read and write
default ExecProcessRequest := true
default SignalProcessRequest := true
default WaitProcessRequest := true
default ReadStreamRequest := true
default WriteStreamRequest := true
default CloseStdinRequest := true
default TtyWinResizeRequest := true
default GetDiagnosticDataRequest := true
default ReadContainerTerminationMessage := true

# files and volumes
default CopyFileRequest := true
default UpdateEphemeralMountsRequest := true
default RemoveStaleVirtiofsShareMountsRequest := true
default VolumeStatsRequest := true
default ResizeVolumeRequest := true

# network
default UpdateInterfaceRequest := true
default ListInterfacesRequest := true
default UpdateRoutesRequest := true
default ListRoutesRequest := true
default AddARPNeighborsRequest := true
default GetIPTablesRequest := true
default SetIPTablesRequest := true

# processors and memory
default OnlineCPUMemRequest := true
default MemHotplugByProbeRequest := true
default AddSwapRequest := true
default AddSwapPathRequest := true
default MemAgentMemcgConfig := true
default MemAgentCompactConfig := true

# what the guest tells of itself
default GetMetricsRequest := true
default GetOOMEventRequest := true
default StartTracingRequest := true
default StopTracingRequest := true
